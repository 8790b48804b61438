"""The packaged model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dam_vllm.demo import model_dir
from dam_vllm.questions.tasks import is_correct, make_questions


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_dir())


def test_is_small(model):
    assert sum(file.stat().st_size for file in model_dir().glob("*.safetensors")) < 10e6
    assert model.config.max_position_embeddings >= 8192 + 512


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|bos|><|user|>\nHello?<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("task", ["lines", "kv", "needle"])
@pytest.mark.parametrize("chat", [False, True])
def test_answers_at_900_tokens(model, tokenizer, task, chat):
    right = 0
    for question in make_questions(task, tokenizer, 900, 8, seed=11):
        messages = [{"role": "user", "content": question.prompt}]
        if chat:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
        else:
            ids = tokenizer(question.prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        right += is_correct(question, tokenizer.decode(output, skip_special_tokens=True))
    assert right >= 6
