"""Questions: their length, their ground truth read back from the prompt, and scoring."""

import re
from collections import Counter
from random import Random

import pytest
from transformers import AutoTokenizer

from dam_vllm.demo import model_dir
from dam_vllm.questions.keys import KINDS, make_keys
from dam_vllm.questions.retrieval import NEEDLES, NUMBER
from dam_vllm.questions.tasks import (
    RETRIEVAL,
    TASK_WORDINGS,
    TASKS,
    Question,
    is_correct,
    make_questions,
)
from dam_vllm.questions.tracking import NAME
from dam_vllm.questions.words import ADJECTIVES, NOUNS, VERBS
from tests.conftest import fresh_seed


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture
def seed():
    return fresh_seed() % 10**6


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [601, 1999])
def test_prompts_fill_their_length(tokenizer, task, tokens, seed):
    for question in make_questions(task, tokenizer, tokens, 5, seed):
        length = len(tokenizer(question.prompt, add_special_tokens=False).input_ids)
        assert question.tokens == length
        assert tokens - 45 <= length <= tokens


@pytest.mark.parametrize("task", RETRIEVAL)
def test_every_wording_and_kind_of_key_asks_for_what_is_there(tokenizer, task):
    for wording in TASK_WORDINGS[task]:
        for keys in KINDS:
            for question in make_questions(task, tokenizer, 700, 3, 1, wording, keys):
                assert question.prompt.count(question.answer) == 1
                at = question.prompt.index(question.answer) / len(question.prompt)
                assert abs(at - question.depth) < 0.05
                asked = TASK_WORDINGS[task][wording].question.split("{key}")[0]
                assert asked in question.prompt[-200:]


# What stands before and behind the name that a question asks for.
ASKED = {
    "lines": (r"in line (\S+)\?", r"^line {}: REGISTER_CONTENT is <(\d+)>$"),
    "kv": (r'value of "(\S+)"\?', r'^"{}": (\d+),$'),
    "needle": (r"number for (\S+)\?", r"^The special magic number for {} is: (\d+)\.$"),
}


@pytest.mark.parametrize("task", RETRIEVAL)
def test_answer_stands_under_the_name_asked_for(tokenizer, task, seed):
    asks, stored = ASKED[task]
    for question in make_questions(task, tokenizer, 900, 6, seed):
        text, _, last = question.prompt.rpartition("\n")
        name = re.search(asks, last)[1]
        assert re.findall(stored.format(name), text, re.MULTILINE) == list(question.answers)


def test_needle_has_several_keys(tokenizer, seed):
    for question in make_questions("needle", tokenizer, 600, 4, seed):
        assert question.prompt.count("The special magic number for") == NEEDLES


@pytest.mark.parametrize("wording", ["question", "completion"])
def test_tracking_asks_for_a_whole_chain(tokenizer, seed, wording):
    for question in make_questions("tracking", tokenizer, 800, 5, seed, wording):
        assigned = dict(re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", question.prompt, re.MULTILINE))

        def value(name, assigned=assigned):
            return value(assigned[name]) if name in assigned else name

        asked = re.search(r"assigned the value (\d+) in the text", question.prompt)[1]
        chain = {name for name in assigned if value(name) == asked}
        assert len(assigned) == 10
        assert set(question.answers) == chain
        assert len(chain) == 5
        last = max(question.prompt.index(f"VAR {name} =") for name in chain)
        assert question.depth == last / len(question.prompt)
        first = {name: question.prompt.index(f"VAR {name} =") for name in assigned}
        later = [name for name, source in assigned.items() if source in assigned]
        assert all(first[assigned[name]] < first[name] for name in later)


@pytest.mark.parametrize("tokens", [600, 1500, 9000])
def test_words_asks_for_the_most_common(tokenizer, seed, tokens):
    for question in make_questions("words", tokenizer, tokens, 3, seed):
        entries = re.findall(r"(\d+)\. (\w+) ", question.prompt)
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries).most_common()
        assert {word for word, _ in counts[:10]} == set(question.answers)
        assert counts[9][1] >= 2 * counts[10][1]
        assert question.depth is None


def test_words_are_none_of_the_wording():
    """A reply that restates the question names nothing."""
    for wording in TASK_WORDINGS["words"].values():
        told = set(re.findall("[a-z]+", (wording.header + wording.question).lower()))
        assert not told & {*ADJECTIVES, *NOUNS, *VERBS}


def test_long_lists_have_words_enough(tokenizer):
    (question,) = make_questions("words", tokenizer, 40_000, 1, 0)
    counts = Counter(word for _, word in re.findall(r"(\d+)\. (\w+) ", question.prompt))
    assert [count for _, count in counts.most_common(11)] == [30] * 10 + [3]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "words"])
def test_depths_are_spread(tokenizer, task):
    depths = [q.depth for q in make_questions(task, tokenizer, 2000, 10, 0)]
    assert depths == sorted(depths)
    assert depths[0] < 0.15
    assert depths[-1] > 0.8


def test_seed_decides(tokenizer):
    first, again, other = (make_questions("kv", tokenizer, 500, 2, seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "poems"}, "task is 'poems', must be one of lines, kv, needle, tracking, words"),
        ({"wording": "rude"}, "wording is 'rude', must be one of longeval"),
        ({"keys": "house"}, "keys is 'house', must be one of pair"),
        *(
            ({"task": task, "tokens": 20}, f"tokens is 20: too few for one {task}")
            for task in TASKS
        ),
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
        ("either 123 or 124", False),
        ("", False),
        ("k123", False),
    ],
)
def test_number_is_right_only_if_it_alone_is_named(reply, right):
    question = Question("lines", "", ("123",), 0, 0.0, NUMBER, ("77",))
    assert is_correct(question, reply) is right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("ABCDE, FGHIJ and KLMNO.", True),
        ("The variables are:\n1. KLMNO\n2. ABCDE\n3. FGHIJ\n\nVAR OTHER = 5", True),
        ("ABCDE, FGHIJ", False),
        ("ABCDE, FGHIJ, KLMNO, PQRST", False),
        ("ABCDE, FGHIJ, PQRST", False),
        ("ABCDEF FGHIJ KLMNO", False),
        ("", False),
    ],
)
def test_names_are_right_only_as_a_whole_set(reply, right):
    question = Question("tracking", "", ("ABCDE", "FGHIJ", "KLMNO"), 0, 0.0, NAME)
    assert is_correct(question, reply) is right


@pytest.mark.parametrize("task", TASKS)
def test_own_answer_is_right_in_any_order_and_another_one_is_not(tokenizer, task, seed):
    first, second = make_questions(task, tokenizer, 700, 2, seed)
    reply = ", ".join(reversed(first.answers))
    assert is_correct(first, reply)
    assert is_correct(first, first.answer.title() if task == "words" else first.answer)
    assert not is_correct(second, reply)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_distinct(kind):
    keys = make_keys(Random(0), kind, 700)
    assert len(set(keys)) == len(keys) == 700
