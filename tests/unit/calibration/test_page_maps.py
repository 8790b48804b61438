"""Maps of pages: summed while attention streams by."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from dam_vllm.calibration import capture
from dam_vllm.calibration.capture import observe_forward, register
from dam_vllm.calibration.static.maps import MapSums, pair_counts
from dam_vllm.calibration.texts import pad
from tests.unit.calibration.conftest import build

pytestmark = pytest.mark.slow

LAYERS, HEADS, PAGE, PAGES = [0, 2], 4, 6, 7  # 42 tokens


@pytest.fixture(autouse=True)
def registered():
    register()


def windows(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lengths]


TEXTS = windows([45, 42, 31, 13, 5])


@pytest.fixture(scope="module")
def dense():
    """Sums of the eager weights of all texts by page, over the queries of each page."""
    total, queries = np.zeros((len(LAYERS), HEADS, PAGES, PAGES)), np.zeros(PAGES)
    eager = build("gqa")
    for text in TEXTS:
        with torch.no_grad():
            weights = eager(torch.tensor([text]), output_attentions=True).attentions
        weights = torch.stack([weights[layer][0] for layer in LAYERS]).numpy()
        for i in range(min(len(text), PAGE * PAGES)):
            queries[i // PAGE] += 1
            for j in range(i + 1):
                total[:, :, i // PAGE, j // PAGE] += weights[:, :, i, j]
    return total / (queries[:, None] + 1e-8), queries


@pytest.mark.parametrize("rows", [1, 4, 6, 11, 1000])  # of a block; most cut pages
def test_maps_equal_page_sums_of_dense_attention(monkeypatch, dense, rows):
    model = build("gqa", capture.IMPLEMENTATION)
    sums = MapSums(LAYERS, torch.zeros(len(LAYERS), HEADS, PAGES, PAGES), PAGE)
    for batch in (TEXTS[:2], TEXTS[2:]):
        ids, lengths = pad(batch)
        monkeypatch.setattr(capture, "BLOCK_BYTES", 4 * HEADS * ids.numel() * rows)
        sums.start_batch(lengths)
        observe_forward(model, ids, LAYERS, sums.observe)
    expected, queries = dense
    counts = pair_counts([len(text) for text in TEXTS], PAGES, PAGE)
    np.testing.assert_array_equal(counts, queries)
    for slot, layer in enumerate(LAYERS):
        found = sums.mean(layer, counts, 1e-8).numpy()
        np.testing.assert_allclose(found, expected[slot], rtol=1e-4, atol=1e-6)


def test_rows_of_a_full_map_hold_all_attention():
    texts = windows([PAGE * PAGES])
    sums = MapSums([1], torch.zeros(1, HEADS, PAGES, PAGES), PAGE)
    sums.start_batch([PAGE * PAGES])
    model = build("gqa", capture.IMPLEMENTATION)
    observe_forward(model, torch.tensor(texts), [1], sums.observe)
    mean = sums.mean(1, pair_counts([PAGE * PAGES], PAGES, PAGE), 1e-8)
    torch.testing.assert_close(mean.sum(dim=-1), torch.ones(HEADS, PAGES))


class Largest(TorchDispatchMode):
    """Remembers the most bytes that a tensor made by any operation takes."""

    size = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


def test_32k_tokens_take_no_tensor_beyond_a_block():
    tokens, page = 2**15, 32
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    config = LlamaConfig(
        **shape, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=tokens
    )
    set_seed(0)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(capture.IMPLEMENTATION)
    pages = tokens // page
    sums = MapSums([0], torch.zeros(1, 1, pages, pages), page)
    lengths = [tokens - 3]
    sums.start_batch(lengths)
    ids = torch.randint(3, 60, (1, lengths[0]))
    with Largest() as largest:
        observe_forward(model.eval(), ids, [0], sums.observe)
    assert capture.BLOCK_BYTES / 2 < largest.size <= capture.BLOCK_BYTES
    mean = sums.mean(0, pair_counts(lengths, pages, page), 1e-8)
    torch.testing.assert_close(mean.sum(dim=-1), torch.ones(1, pages))
