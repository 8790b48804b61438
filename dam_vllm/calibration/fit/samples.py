"""Texts of the fit: plain ones, and questions about long texts with the model's own replies.

Plain text alone makes every head look local. Where a model answers a question about something
far back, its retrieval heads are at work; the model's own greedy reply says where that is,
without labels.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from dam_vllm.calibration.texts import special_prefix
from dam_vllm.questions.keys import KINDS
from dam_vllm.questions.prompting import chat_tokens, prompting
from dam_vllm.questions.tasks import make_questions
from dam_vllm.questions.wordings import WORDINGS

REPLY_TOKENS = 24
PLAIN = "plain"
# Seeds of evaluations are small numbers; the fit's questions are never theirs.
SEED_PREFIX = "fit"


@dataclass(frozen=True)
class FitText:
    """A text in tokens.

    Attributes:
        kind: "plain", or the task of its question.
        ids: prompt and reply.
        prompt: tokens of the prompt; all of a plain text.
    """

    kind: str
    ids: list[int]
    prompt: int

    def asking(self, page: int) -> int:
        """First row of the page that ends the question; with a reply's, these rows look back."""
        return len(self.ids) if self.kind == PLAIN else (self.prompt - 1) // page * page


def question_prompts(
    tokenizer: Any, lengths: list[int], samples: int, seed: int
) -> list[tuple[str, list[int]]]:
    """Prompts of all retrieval tasks, wordings and kinds of keys taking turns.

    Args:
        tokenizer: of the model; its chat template is used where it has one.
        lengths: tokens of the prompts.
        samples: prompts of each task and length.
        seed: of the questions.

    Returns:
        Task and token ids of each prompt.
    """
    rng = Random(f"{SEED_PREFIX}/{seed}")
    overhead = prompting(tokenizer).overhead
    found = []
    for length in lengths:
        for task, wordings in WORDINGS.items():
            # A model without a chat template has a text to go on with instead of a question.
            chat = tokenizer.chat_template is not None
            names = [name for name, wording in wordings.items() if wording.continues != chat]
            for sample in range(samples):
                questions = make_questions(
                    task,
                    tokenizer,
                    length - overhead - REPLY_TOKENS,
                    samples,
                    rng.randrange(10**9, 10**10),
                    names[sample % len(names)],
                    KINDS[sample % len(KINDS)],
                )
                found.append((task, _tokens(tokenizer, questions[sample].prompt)))
    return found


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        # No token that ends a text: the reply goes on from here.
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return special_prefix(tokenizer) + list(ids)
    return chat_tokens(tokenizer, prompt)


def with_reply(model: Any, task: str, prompt: list[int]) -> FitText:
    """Adds the model's greedy reply under full attention."""
    inputs = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        ids = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=REPLY_TOKENS,
            do_sample=False,
        )  # fmt: skip
    return FitText(task, ids[0].tolist(), len(prompt))
