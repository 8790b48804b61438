"""What an evaluation is asked to do, and what it compares."""

from dataclasses import dataclass
from pathlib import Path

from dam_vllm.masks.mask_set import MaskSet

DENSE = "dense"
TEXT = "text"  # stands for a task in the keys of what was measured on the text
Key = tuple[str, str, int, int]  # subject, task or TEXT, length, index
REPLY_TOKENS = {"lines": 48, "kv": 48, "needle": 48, "tracking": 128, "words": 160}


@dataclass(frozen=True)
class Settings:
    """The choices of one evaluation.

    Attributes:
        model: folder or Hub id.
        tasks: of `tasks.TASKS`.
        lengths: of the prompts in tokens, chat template included, in rising order.
        samples: questions a task and length.
        seed: of the questions.
        page: tokens a KV-cache page.
        dense_below: query positions below it attend densely.
        streaming: whether to ask sinks and a window of equal density too.
        serve_args: further arguments of `vllm serve`.
        text: text for perplexity and agreement, or None.
        windows: pieces of it a length.
        record_keys: what kind of keys the records have, of `keys.KINDS`.
        completion: whether to ask by completions where the tokenizer has a chat template too.
    """

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    page: int
    dense_below: int
    streaming: bool
    serve_args: tuple[str, ...] = ()
    text: str | None = None
    windows: int = 0
    record_keys: str = "pair"
    completion: bool = False

    @property
    def max_length(self) -> int:
        """Longest request in tokens, reply included."""
        return max(self.lengths) + max(REPLY_TOKENS[task] for task in self.tasks)

    @property
    def steps(self) -> int:
        """Requests that a subject is asked at each length."""
        return len(self.tasks) * self.samples + self.windows

    def question_keys(self, subject: str, task: str, length: int) -> list[Key]:
        """Keys of the answers to one task at one length."""
        return [(subject, task, length, index) for index in range(self.samples)]

    def window_keys(self, subject: str, length: int) -> list[Key]:
        """Keys of what was measured on the text at one length."""
        return [(subject, TEXT, length, index) for index in range(self.windows)]

    def keys(self, subject: str, length: int) -> list[Key]:
        """Keys of all that a subject is asked at one length, questions first."""
        asked = [key for task in self.tasks for key in self.question_keys(subject, task, length)]
        return asked + self.window_keys(subject, length)


@dataclass(frozen=True)
class Subject:
    """One thing that answers: full attention, or a set of masks.

    Attributes:
        name: in rows and tables.
        key: what its stored measurements are known by.
        masks: the masks, or None for stock vLLM.
        file: where they lie, or None where they are made on the way.
    """

    name: str
    key: str
    masks: MaskSet | None = None
    file: Path | None = None


STOCK = Subject(DENSE, DENSE)


@dataclass(frozen=True)
class Place:
    """One subject at one length."""

    subject: Subject
    length: int
