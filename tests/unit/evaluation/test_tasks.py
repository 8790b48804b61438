import pytest
from transformers import AutoTokenizer

from dam_vllm.demo import model_dir
from dam_vllm.evaluation.keys import KINDS, make_keys
from dam_vllm.evaluation.tasks import TASKS, Question, is_correct, make_questions
from dam_vllm.evaluation.wordings import WORDINGS


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_dir())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [601, 1999])
def test_prompts_fill_their_length(tokenizer, task, tokens):
    for question in make_questions(task, tokenizer, tokens, 5, seed=3):
        length = len(tokenizer(question.prompt, add_special_tokens=False).input_ids)
        assert question.tokens == length
        assert tokens - 45 <= length <= tokens


@pytest.mark.parametrize("task", TASKS)
def test_every_wording_and_kind_of_key_asks_for_what_is_there(tokenizer, task):
    for wording in WORDINGS[task]:
        for keys in KINDS:
            for question in make_questions(task, tokenizer, 700, 3, 1, wording, keys):
                assert question.prompt.count(question.answer) == 1
                at = question.prompt.index(question.answer) / len(question.prompt)
                assert abs(at - question.depth) < 0.15
                asked = WORDINGS[task][wording].question.split("{key}")[0]
                assert asked in question.prompt[-200:]


def test_depths_are_spread(tokenizer):
    depths = [q.depth for q in make_questions("lines", tokenizer, 2000, 10, 0)]
    assert depths == sorted(depths)
    assert depths[0] < 0.12
    assert depths[-1] > 0.8


def test_seed_decides(tokenizer):
    first, again, other = (make_questions("kv", tokenizer, 500, 2, seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "poems"}, "task is 'poems', must be one of lines, kv, needle"),
        ({"wording": "rude"}, "wording is 'rude', must be one of longeval"),
        ({"keys": "house"}, "keys is 'house', must be one of pair"),
        ({"tokens": 20}, "tokens is 20: too few"),
    ],
)
def test_bad_arguments(tokenizer, changed, message):
    arguments = {"task": "lines", "tokenizer": tokenizer, "tokens": 500, "samples": 1, "seed": 0}
    with pytest.raises(ValueError, match=message):
        make_questions(**(arguments | changed))


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("line a-b: REGISTER_CONTENT is <123>\nline c-d: <4>", True),
        ("\n123", True),
        ("It is 123.", True),
        ("key 77 holds 123", True),
        ("1234", False),
        ("line a-b: <12>\n123", False),
        ("", False),
        ("k123", False),
    ],
)
def test_reply_is_right_only_if_its_value_is(reply, right):
    assert is_correct(Question("lines", "", "123", 0, 0.0), reply) is right


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_distinct(kind):
    from random import Random

    keys = make_keys(Random(0), kind, 700)
    assert len(set(keys)) == len(keys) == 700
