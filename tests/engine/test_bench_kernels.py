"""The functions under measurement compute what they are compared for."""

import pytest
import torch

from dam_vllm.attention.cpu.select import span_tokens
from dam_vllm.attention.oracle import masked_attention, page_mask
from dam_vllm.bench.masks import streaming_masks
from dam_vllm.masks.page_tables import PageSelector, page_tables
from tests.unit.attention.cpu.test_score import by_page

pytestmark = pytest.mark.engine

GROUP, KV_HEADS, WINDOW_PAGES = 2, 3, 1


@pytest.fixture(params=[32, 128])
def prompt(request, rng):
    from dam_vllm.bench.on_vllm.cpu_kernels import Shape, random_prompt

    torch.manual_seed(int(rng.integers(2**31)))
    return random_prompt(Shape(GROUP * KV_HEADS, KV_HEADS, 64, request.param), 777)


def oracle(prompt, masks):
    """Float32 attention of the whole prompt, [tokens, heads, head_size]."""
    tokens, page = len(prompt.query), prompt.shape.page
    mask = torch.from_numpy(page_mask(masks, 0, 0, tokens, page))
    return masked_attention(prompt.query, prompt.key, prompt.value, mask, prompt.shape.scale)


def test_dense_step_equals_oracle(prompt):
    from dam_vllm.bench.on_vllm.cpu_kernels import dense_step

    pages = prompt.step.block_table.shape[1]
    everything = streaming_masks(KV_HEADS, pages, prompt.shape.page, GROUP)
    found = dense_step(prompt)().float()
    torch.testing.assert_close(found, oracle(prompt, everything), rtol=2e-2, atol=2e-2)


def test_virtual_step_equals_oracle(prompt):
    from dam_vllm.bench.on_vllm.cpu_kernels import virtual_step

    masks = streaming_masks(KV_HEADS, WINDOW_PAGES, prompt.shape.page, GROUP)
    selector = PageSelector([page_tables(masks, 0, prompt.shape.page)])
    found = virtual_step(prompt, selector)().float()
    torch.testing.assert_close(found, oracle(prompt, masks), rtol=2e-2, atol=2e-2)


def test_dynamic_steps_are_what_they_are_called(prompt):
    from dam_vllm.bench.masks import dynamic_masks
    from dam_vllm.bench.on_vllm.cpu_kernels import dynamic_steps

    channels, page = 16, prompt.shape.page
    steps = dynamic_steps(prompt, dynamic_masks(KV_HEADS, GROUP, 64, channels, 64))
    gathered, pages = steps.gather(), 777 // page
    key = prompt.key[: pages * page, :, :channels].float().view(pages, page, KV_HEADS, channels)
    assert torch.equal(gathered[:, :pages], key.permute(2, 0, 3, 1))
    size = span_tokens(page, GROUP)
    first = 777 // size * size
    query = prompt.query[first:].float().unflatten(1, (KV_HEADS, GROUP))[:, -1, :, :channels]
    expected = torch.matmul(query.flatten(0, 1), gathered[-1]).amax(-1)
    found = by_page(steps.product())[:, : len(query) * GROUP]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    selected = steps.select()
    assert selected.shape == (KV_HEADS, pages + 1, pages + 1)
    assert torch.equal(selected, selected.tril())
    read = selected.repeat_interleave(page, 1).repeat_interleave(page, 2)[:, :777, :777].tril()
    for tails, output in (((), steps.whole()), (range(KV_HEADS), steps.tailed())):
        query, key, value = prompt.query.float(), prompt.key.float(), prompt.value.float()
        expected = masked_attention(
            query, key, value, read.repeat_interleave(GROUP, 0), prompt.shape.scale,
            tails=tails, page=page,
        )  # fmt: skip
        torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("page", [32, 128])
def test_flex_sees_the_same_mask(rng, page):
    """Blocks only change which pairs are computed, so the eager function tells enough."""
    from torch.nn.attention.flex_attention import flex_attention

    from dam_vllm.bench.flex import block_mask
    from dam_vllm.bench.on_vllm.cpu_kernels import Shape, random_prompt, virtual_step

    torch.manual_seed(int(rng.integers(2**31)))
    prompt = random_prompt(Shape(GROUP * KV_HEADS, KV_HEADS, 64, page), 640)
    masks = streaming_masks(KV_HEADS, WINDOW_PAGES, page, GROUP)
    selector = PageSelector([page_tables(masks, 0, page)])
    selected = selector.select(torch.arange(5), 5 * selector.own)[0, :1]
    mask = block_mask(selected, 640, 640, page)
    dense = mask.to_dense()[0].bool()
    assert torch.equal(dense, selected)
    compiled = torch.compile(flex_attention, dynamic=False)
    inputs = [part.transpose(0, 1)[None] for part in (prompt.query, prompt.key, prompt.value)]
    found = compiled(*inputs, block_mask=mask, scale=prompt.shape.scale, enable_gqa=True)
    expected = virtual_step(prompt, selector)().float()
    torch.testing.assert_close(found[0].transpose(0, 1).float(), expected, rtol=3e-2, atol=3e-2)
