"""Whether a model is asked in a chat or by completion, and what that adds to a prompt."""

from dataclasses import dataclass
from typing import Any

from dam_vllm.questions.tasks import COMPLETION

TEMPLATE_OPTIONS = {"enable_thinking": False}
"""Templates that know the switch leave out the thinking, which needs many tokens."""


@dataclass(frozen=True)
class Prompting:
    """How a model is asked.

    Attributes:
        chat: through the chat endpoint, as its tokenizer has a chat template.
        overhead: tokens that the template or the tokenizer adds to a prompt's own.
    """

    chat: bool
    overhead: int

    @property
    def wording(self) -> str | None:
        """Wording for `make_questions`: a model without a template has a text to go on with."""
        return None if self.chat else COMPLETION


def prompting(tokenizer: Any, completion: bool = False) -> Prompting:
    """Finds out how a model is asked.

    Args:
        tokenizer: its transformers tokenizer.
        completion: whether a chat template is left alone.

    Returns:
        Chat where there is a template, else completion.
    """
    text = "text"
    plain = len(tokenizer(text, add_special_tokens=False).input_ids)
    if completion or tokenizer.chat_template is None:
        return Prompting(False, len(tokenizer(text).input_ids) - plain)
    return Prompting(True, len(chat_tokens(tokenizer, text)) - plain)


def chat_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens that a chat endpoint makes of one message of a user.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        prompt: the message.
    """
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        **TEMPLATE_OPTIONS,
    )
    return list(found["input_ids"])
