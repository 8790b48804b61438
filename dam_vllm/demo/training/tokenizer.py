"""The demo model's tokenizer: byte-level BPE that cuts text in the same places everywhere.

Words, groups of at most two digits and punctuation are cut apart before BPE, so a record's
tokens do not depend on what stands beside it. Pieces of text may then be tokenised one by one.
"""

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dam_vllm.evaluation.wordings import WORDINGS
from dam_vllm.evaluation.words import ADJECTIVES, NOUNS, VERBS

VOCABULARY = 2560
PAD, BOS, END, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
)
PAD_ID, BOS_ID, END_ID, USER_ID, ASSISTANT_ID = range(len(SPECIAL_TOKENS))

# Punctuation takes at most one newline along: a blank line after a record then leaves the
# record's tokens as they are.
_PIECE = r"\d{1,2}| ?[A-Za-z_]+| ?[^\sA-Za-z_\d]+\n?|\s*[\r\n]+|\s+(?!\S)|\s+"
# More often than any piece of the corpus: these words become whole tokens.
_OFTEN = 3000


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains the tokenizer.

    Args:
        texts: Text for the part of the vocabulary that the questions' words leave free.

    Returns:
        A tokenizer of ``VOCABULARY`` tokens which puts BOS before every text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_words(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def _with_words(texts: Iterable[str]) -> Iterator[str]:
    """Yields the questions' words, often enough to become tokens, and then the texts."""
    for word in ADJECTIVES + NOUNS:
        yield f" {word}\n{word}\n" * _OFTEN
    for word in VERBS:
        yield f" {word}" * _OFTEN
    for number in range(100):
        yield f"{number:02d} " * _OFTEN
    for wordings in WORDINGS.values():
        for wording in wordings.values():
            template = wording.header + wording.record + wording.footer + wording.question
            yield template.replace("{key}", "").replace("{value}", "") * (2 * _OFTEN)
    yield from texts
