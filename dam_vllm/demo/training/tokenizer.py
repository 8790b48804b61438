"""The demo model's tokenizer: byte-level BPE, digits in groups of at most two."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dam_vllm.questions.wordings import WORDINGS
from dam_vllm.questions.words import ADJECTIVES, NOUNS, VERBS

VOCABULARY = 2304
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, BOS, EOS, USER, ASSISTANT, END = range(len(SPECIAL))
PIECES = r"\d{1,2}| ?[A-Za-z_]+| ?[^\sA-Za-z_\d]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SKIPPED = ("/test", "site-packages", "idlelib", "lib2to3", "/encodings/", "pydoc_data")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def library_sources() -> list[str]:
    """Sources of the Python standard library on this machine, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if not any(s in str(file) for s in SKIPPED))
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    return [text for text in texts if text.isascii() and len(text) > 2000]


def train_tokenizer(sources: list[str]) -> Tokenizer:
    """Trains the tokenizer so that every listed word and two-digit number is one token.

    Args:
        sources: texts for the rest of the vocabulary.

    Returns:
        The tokenizer; it puts `<|bos|>` first.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(sources), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return tokenizer


def _texts(sources: list[str]) -> Iterator[str]:
    repeats = 3000
    for word in ADJECTIVES:
        yield f" {word}\n" * repeats + f'"{word}' * repeats
    for word in NOUNS:
        yield f"-{word}\n {word}\n" * repeats
    for word in VERBS:
        yield f" {word}" * repeats
    yield from (f"{number:02d} " * repeats for number in range(100))
    for wordings in WORDINGS.values():
        for w in wordings.values():
            yield (w.header + w.record * 2 + w.footer + w.question + w.reply) * repeats
    yield from sources
