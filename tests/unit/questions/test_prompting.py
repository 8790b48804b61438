"""What a chat template adds, for models that think unless they are told not to."""

import pytest
from transformers import AutoTokenizer

from dam_vllm.calibration.fit.samples import REPLY_TOKENS, question_prompts
from dam_vllm.demo import model_dir
from dam_vllm.questions.prompting import TEMPLATE_OPTIONS, Prompting, chat_tokens, prompting

NO_THINKING = "assistant: <think> </think> "
# As Qwen 3 writes it: an empty thought stands at the end where thinking is off.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and not enable_thinking %}<think> </think> {% endif %}"
    "{% endif %}"
)


@pytest.fixture
def tokenizer():
    found = AutoTokenizer.from_pretrained(model_dir())
    found.chat_template = TEMPLATE
    return found


def test_prompts_are_what_a_server_makes_of_them_without_thinking(tokenizer):
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "text"}], tokenize=False, add_generation_prompt=True,
        **TEMPLATE_OPTIONS,
    )  # fmt: skip
    assert asked == f"user: text {NO_THINKING}"
    served = tokenizer(asked, add_special_tokens=False).input_ids
    assert chat_tokens(tokenizer, "text") == served
    own = len(tokenizer("text", add_special_tokens=False).input_ids)
    assert prompting(tokenizer) == Prompting(True, len(served) - own)


def test_questions_of_a_fit_end_without_thinking_and_leave_room_for_the_reply(tokenizer):
    for _, ids in question_prompts(tokenizer, [700], 1, 0):
        assert tokenizer.decode(ids).endswith(NO_THINKING)
        assert 600 < len(ids) <= 700 - REPLY_TOKENS
