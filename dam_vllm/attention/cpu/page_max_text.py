"""LLVM's text of largest scores: a vector of rows at a time, page after page, TOKENS at a time."""

from dataclasses import dataclass

from dam_vllm.masks.rounding import ceil_div

# Tokens whose scores are held in registers at a time. 16, and fewer by several vectors of rows,
# took from 4 percent less (once, with 32 channels) to 30 percent more.
TOKENS = 8


@dataclass(frozen=True)
class Types:
    """How LLVM writes the types of a function with so many rows a vector."""

    lanes: int
    pairs: bool

    @property
    def word(self) -> str:
        """A channel, or a pair of them."""
        return "i32" if self.pairs else "float"

    @property
    def words(self) -> str:
        return f"<{self.lanes} x {self.word}>"

    def depth(self, channels: int) -> int:
        """Words of so many channels."""
        return ceil_div(channels, 2) if self.pairs else channels

    @property
    def scores(self) -> str:
        return f"<{self.lanes} x float>"

    @property
    def factors(self) -> str:
        """What the product takes: words, seen as channels."""
        return f"<{2 * self.lanes} x bfloat>" if self.pairs else self.words

    @property
    def lowest(self) -> str:
        """Scores of -inf, without their type."""
        return f"<{', '.join(['float 0xFFF0000000000000'] * self.lanes)}>"

    @property
    def product(self) -> str:
        return "@llvm.x86.avx512bf16.dpbf16ps.512" if self.pairs else f"@llvm.fma.v{self.lanes}f32"

    @property
    def declaration(self) -> str:
        # The addend is first for the product of pairs, last for `fma`, where all types are alike.
        return (
            f"declare {self.scores} {self.product}({self.scores}, {self.factors}, {self.factors})"
        )


def body(depth: int, page: int, types: Types) -> str:
    """LLVM's text of `page_max`.

    Args:
        depth: channels, or pairs of them.
        page: tokens a page.
        types: of the vectors; rows are a multiple of their lanes.
    """
    return _every_vector(
        f"""
  br label %next.page
next.page:
  %at = phi i64 [0, %begin.rows], [%at.next, %end.page]
{_best_of_page("next.page", "end.page", depth, page, types)}
  %result.line = mul i64 %row, %pages
  %result.page = mul i64 %at, {types.lanes}
  %result.at = add i64 %result.line, %result.page
  %result.place = getelementptr float, ptr %result, i64 %result.at
  store {types.scores} %best.{TOKENS}, ptr %result.place, align 4
  %at.next = add i64 %at, 1
  %pages.more = icmp ult i64 %at.next, %pages
  br i1 %pages.more, label %next.page, label %end.rows""",
        types,
    )


def own_body(depth: int, page: int, types: Types) -> str:
    """LLVM's text of `own_page_max`: causal largest scores of rows in their own pages.

    `places` are where in its page each row's query stands, of the `each` rows of a query block;
    `first` is the page of the first query block.
    """
    places = f"<{types.lanes} x i32>"
    return _every_vector(
        f"""
  %block = udiv i64 %row, %each
  %at = add i64 %first, %block
  %within = urem i64 %row, %each
  %places.place = getelementptr i32, ptr %places, i64 %within
  %places.mine = load {places}, ptr %places.place, align 4
{_best_of_page("begin.rows", "end.page", depth, page, types, causal=True)}
  %result.place = getelementptr float, ptr %result, i64 %row
  store {types.scores} %best.{TOKENS}, ptr %result.place, align 4
  br label %end.rows""",
        types,
    )


def _every_vector(inner: str, types: Types) -> str:
    """Every thread's vectors of rows; `inner` begins in `begin.rows` and goes to `end.rows`."""
    return f"""
  %start = mul i64 %thread, {types.lanes}
  %step = mul i64 %threads, {types.lanes}
  br label %next.rows
next.rows:
  %row = phi i64 [%start, %entry], [%row.next, %end.rows]
  %rows.more = icmp ult i64 %row, %rows
  br i1 %rows.more, label %begin.rows, label %done
begin.rows:
{inner}
end.rows:
  %row.next = add i64 %row, %step
  br label %next.rows
"""


def _best_of_page(
    entry: str, end: str, depth: int, page: int, types: Types, causal: bool = False
) -> str:
    """The largest scores of %row's vector in page %at: %best.TOKENS, in the block `end`.

    Args:
        entry: the block before.
        end: the block after.
        depth: channels, or pairs of them.
        page: tokens a page.
        types: of the vectors.
        causal: whether rows see tokens up to %places.mine alone.
    """
    scores = types.scores
    return f"""
  %key.at = mul i64 %at, {depth * page}
  %key.page = getelementptr {types.word}, ptr %keys, i64 %key.at
  br label %next.tokens
next.tokens:
  %token = phi i64 [0, %{entry}], [%token.next, %next.tokens]
  %best.0 = phi {scores} [{types.lowest}, %{entry}], [%best.{TOKENS}, %next.tokens]
  %key = getelementptr {types.word}, ptr %key.page, i64 %token
{_products(depth, page, types)}
{_seen(depth, types) if causal else ""}
{_maxima(types, "causal" if causal else f"sum.{depth - 1}")}
  %token.next = add i64 %token, {TOKENS}
  %tokens.more = icmp ult i64 %token.next, {page}
  br i1 %tokens.more, label %next.tokens, label %{end}
{end}:"""


def _seen(depth: int, types: Types) -> str:
    """Scores of tokens that rows may see: %causal.T, else -inf."""
    places, scores = f"<{types.lanes} x i32>", types.scores
    lines = [
        "%token.short = trunc i64 %token to i32",
        f"%token.first = insertelement {places} poison, i32 %token.short, i32 0",
        f"%token.all = shufflevector {places} %token.first, {places} poison, "
        f"{places} zeroinitializer",
    ]
    for token in range(TOKENS):
        later = ", ".join([f"i32 {token}"] * types.lanes)
        lines += [
            f"%token.{token} = add {places} %token.all, <{later}>",
            f"%seen.{token} = icmp sge {places} %places.mine, %token.{token}",
            f"%causal.{token} = select <{types.lanes} x i1> %seen.{token}, "
            f"{scores} %sum.{depth - 1}.{token}, {scores} {types.lowest}",
        ]
    return "\n".join(f"  {line}" for line in lines)


def _products(depth: int, page: int, types: Types) -> str:
    """Adds up the products of all channels: %sum.C.T with channel C, of token T."""
    word, words, scores, factors = types.word, types.words, types.scores, types.factors
    lines = []
    for at in range(depth):
        lines += [
            f"%line.{at} = mul i64 %rows, {at}",
            f"%query.at.{at} = add i64 %line.{at}, %row",
            f"%query.place.{at} = getelementptr {word}, ptr %query, i64 %query.at.{at}",
            f"%query.words.{at} = load {words}, ptr %query.place.{at}, align 4",
            f"%query.{at} = bitcast {words} %query.words.{at} to {factors}",
        ]
        for token in range(TOKENS):
            name = f"{at}.{token}"
            before = f"{scores} %sum.{at - 1}.{token}" if at else f"{scores} zeroinitializer"
            each = (f"{factors} %query.{at}", f"{factors} %key.{name}")
            order = (before, *each) if types.pairs else (*each, before)
            lines += [
                f"%key.place.{name} = getelementptr {word}, ptr %key, i64 {at * page + token}",
                f"%key.one.{name} = load {word}, ptr %key.place.{name}, align 4",
                f"%key.first.{name} = insertelement {words} poison, {word} %key.one.{name}, i32 0",
                f"%key.words.{name} = shufflevector {words} %key.first.{name}, {words} poison, "
                f"<{types.lanes} x i32> zeroinitializer",
                f"%key.{name} = bitcast {words} %key.words.{name} to {factors}",
                f"%sum.{name} = call {scores} {types.product}({', '.join(order)})",
            ]
    return "\n".join(f"  {line}" for line in lines)


def _maxima(types: Types, values: str) -> str:
    """Takes the largest of %best.0 and all %VALUES.T: %best.T of T tokens."""
    lines, scores = [], types.scores
    for token in range(TOKENS):
        value = f"{scores} %{values}.{token}"
        lines += [
            f"%larger.{token} = fcmp ogt {value}, %best.{token}",
            f"%best.{token + 1} = select <{types.lanes} x i1> %larger.{token}, {value}, "
            f"{scores} %best.{token}",
        ]
    return "\n".join(f"  {line}" for line in lines)
