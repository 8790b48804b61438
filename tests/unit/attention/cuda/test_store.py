"""Storing by heads against plain indexing."""

import numpy as np
import pytest
import torch

from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.store import store_heads
from tests.unit.attention.cuda.launches import Launches

HEADS, SIZE, PAGE, GROUPS, UNIT, BLOCKS, TOKENS = 3, 40, 16, 4, 2, 12, 29


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float8_e4m3fn)],
)
def test_each_head_goes_to_its_groups_slot(rng, device, dtype, stored):
    torch.manual_seed(int(rng.integers(2**31)))
    pool = torch.full((BLOCKS * UNIT * 5, 1, PAGE, 2 * SIZE), torch.nan).to(stored or dtype)
    keys, values = pool.to(device).view(-1, PAGE, 2 * SIZE).split(SIZE, dim=2)
    # A fused projection, with rows of padding at its end.
    fused = torch.randn(TOKENS + 3, 5 * HEADS, SIZE).to(dtype).to(device)
    key, value = fused[:, HEADS : 2 * HEADS], fused[:, 3 * HEADS : 4 * HEADS]
    slots = np.stack([rng.permutation(BLOCKS * PAGE)[: TOKENS + 9] for _ in range(GROUPS)])
    groups, offsets = (
        torch.tensor([2, 0, 3]),
        torch.tensor([BLOCKS * UNIT + 1, 0, 3 * BLOCKS * UNIT]),
    )
    homes = Homes.unknown(HEADS, UNIT, device)
    homes.tell(offsets, groups)
    own = torch.from_numpy(slots[1, :TOKENS]).to(device)
    own[rng.choice(TOKENS, 5, replace=False)] = -1
    scales = (torch.tensor(0.3, device=device), torch.tensor(1.7, device=device))
    given = (key, value, keys, values, own, torch.from_numpy(slots).to(device), homes, scales)
    store_heads(*given)
    wanted = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)
    for token in range(TOKENS):
        for head in range(HEADS) if own[token] >= 0 else ():
            slot = int(slots[groups[head], token])
            page = slot // PAGE * UNIT + int(offsets[head])
            for part, vectors, scale in zip(wanted, (key, value), scales, strict=True):
                vector = vectors[token, head]
                if stored:
                    vector = (vector.float() / scale).to(stored)
                part[page, slot % PAGE] = vector
    for found, part in zip((keys, values), wanted, strict=True):
        torch.testing.assert_close(found.float(), part.float(), rtol=0, atol=0, equal_nan=True)
    with Launches() as launches:
        store_heads(*given)
    assert launches.all == ["_store_kernel"]
