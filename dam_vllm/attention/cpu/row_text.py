"""Pieces of LLVM's text for sequences of queries, whose rows are the lanes of whole vectors."""

from collections.abc import Sequence

from dam_vllm.attention.cpu.llvm_text import loop, spread
from dam_vllm.attention.cpu.page_max_text import Types

# Words of keys whose products are one turn of a loop.
WORDS = 4


def declarations(types: Types) -> str:
    """What functions over such sequences call; products of pairs beside those of float32."""
    lanes, vector = types.lanes, types.scores
    text = "\n".join(
        f"declare {vector} @llvm.{name}.v{lanes}f32({', '.join([vector] * count)})"
        for name, count in (("fma", 3), ("rint", 1), ("maxnum", 2), ("minnum", 2))
    )
    return f"{text}\n{types.declaration}" if types.pairs else text


def numbers(types: Types) -> str:
    """Factor and cap of scores, and what is added to logits of spans: %scale, %cap, %bias."""
    return "\n".join(
        f"""  %{name}.place = getelementptr float, ptr %numbers, i64 {at}
  %{name}.one = load float, ptr %{name}.place, align 4
{spread(name, types.lanes)}"""
        for at, name in enumerate(("scale", "cap", "bias"))
    )


def sequence() -> str:
    """Of sequence %each.at: its vectors from %from to %until, its %count %entries of the table."""
    return """
  %from.place = getelementptr i64, ptr %first, i64 %each.at
  %from = load i64, ptr %from.place, align 8
  %until.place = getelementptr i64, ptr %from.place, i64 1
  %until = load i64, ptr %until.place, align 8
  %count.place = getelementptr i64, ptr %counts, i64 %each.at
  %count = load i64, ptr %count.place, align 8
  %row = mul i64 %each.at, %width
  %entries = getelementptr i32, ptr %table, i64 %row"""


def asked(depth: int, types: Types) -> str:
    """Of vector %vectors.at: its %asked, vectors of so many words, and %tops and %totals."""
    vector = types.scores
    return f"""
  %asked.at = mul i64 %vectors.at, {depth}
  %asked = getelementptr {types.words}, ptr %query, i64 %asked.at
  %top.place = getelementptr {vector}, ptr %tops, i64 %vectors.at
  %top.before = load {vector}, ptr %top.place, align 4
  %total.place = getelementptr {vector}, ptr %totals, i64 %vectors.at
  %total.before = load {vector}, ptr %total.place, align 4"""


def products(
    name: str, entry: str, depth: str, asked: str, keys: str, strides: tuple[int, int],
    count: int, types: Types,
) -> str:  # fmt: skip
    """Adds up products of a vector of rows with some keys: %NAME.sum.K, in the block NAME.done.

    Args:
        name: of the loop.
        entry: the block before.
        depth: i64, words of each key; a multiple of WORDS.
        asked: where the vector's words lie, one after the other.
        keys: where the first key begins.
        strides: words from one key to the next, and from a word of a key to its next.
        count: of keys.
        types: of the vectors.
    """
    word, words, scores, factors = types.word, types.words, types.scores, types.factors
    apart, deep = strides
    lines = [
        f"%{name}.step = mul i64 %{name}.at, {WORDS}",
        f"%{name}.asked = getelementptr {words}, ptr {asked}, i64 %{name}.step",
        f"%{name}.far = mul i64 %{name}.at, {WORDS * deep}",
        f"%{name}.keys = getelementptr {word}, ptr {keys}, i64 %{name}.far",
    ]
    for at in range(WORDS):
        lines += [
            f"%{name}.place.{at} = getelementptr {words}, ptr %{name}.asked, i64 {at}",
            f"%{name}.words.{at} = load {words}, ptr %{name}.place.{at}, align 4",
            f"%{name}.rows.{at} = bitcast {words} %{name}.words.{at} to {factors}",
        ]
        for key in range(count):
            one, summed = f"{name}.{at}.{key}", f"{name}.sum.{key}"
            before = f"{scores} %{f'{summed}.{at}' if at else summed}"
            each = (f"{factors} %{name}.rows.{at}", f"{factors} %{one}")
            order = (before, *each) if types.pairs else (*each, before)
            lines += [
                f"%{one}.place = getelementptr {word}, ptr %{name}.keys, "
                f"i64 {at * deep + key * apart}",
                f"%{one}.one = load {word}, ptr %{one}.place, align 4",
                f"%{one}.first = insertelement {words} poison, {word} %{one}.one, i32 0",
                f"%{one}.words = shufflevector {words} %{one}.first, {words} poison, "
                f"<{types.lanes} x i32> zeroinitializer",
                f"%{one} = bitcast {words} %{one}.words to {factors}",
                f"%{summed}.{'next' if at == WORDS - 1 else at + 1} = call {scores} "
                f"{types.product}({', '.join(order)})",
            ]
    sums = [(f"{name}.sum.{key}", scores, "zeroinitializer") for key in range(count)]
    turns = f"  %{name}.turns = udiv i64 {depth}, {WORDS}\n"
    return turns + loop(name, entry, "0", f"%{name}.turns", indented(lines), sums)


def largest(name: str, values: Sequence[str], types: Types) -> list[str]:
    """Lines that take the largest of vectors: %NAME."""
    call = f"call {types.scores} @llvm.maxnum.v{types.lanes}f32"
    return _in_pairs(name, f"{call}({types.scores} {{}}, {types.scores} {{}})", values)


def added(name: str, values: Sequence[str], types: Types) -> list[str]:
    """Lines that add vectors up: %NAME."""
    return _in_pairs(name, f"fadd {types.scores} {{}}, {{}}", values)


def _in_pairs(name: str, operation: str, values: Sequence[str]) -> list[str]:
    """Joins values in pairs: one after the other, each would wait for the one before."""
    lines, made = [], 0
    left = list(values)
    while len(left) > 1:
        joined = f"%{name}" if len(left) == 2 else f"%{name}.{made}"
        lines.append(f"{joined} = {operation.format(left.pop(0), left.pop(0))}")
        left.append(joined)
        made += 1
    return lines


def indented(lines: Sequence[str]) -> str:
    """Lines of a text."""
    return "\n".join(f"  {line}" for line in lines)
