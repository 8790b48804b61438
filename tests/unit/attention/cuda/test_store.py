"""Storing by heads against plain indexing."""

import numpy as np
import pytest
import torch

from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.rotation import DeviceRotation
from dam_vllm.attention.cuda.store import HeadStore
from tests.unit.attention.cuda.launches import Launches

HEADS, SIZE, PAGE, GROUPS, UNIT, BLOCKS, TOKENS = 3, 40, 16, 4, 2, 12, 45
TURNED = [2, 0]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("dtype", "stored", "error"),
    [
        (torch.float32, None, 1e-5),
        (torch.bfloat16, None, 1e-2),
        (torch.bfloat16, torch.float8_e4m3fn, 0.13),
    ],
)
def test_each_head_goes_to_its_slot(rng, device, dtype, stored, error, grouped, rotated):
    """To that of its group, where there are several; heads that are not turned bit for bit."""
    torch.manual_seed(int(rng.integers(2**31)))
    pool = torch.full((BLOCKS * HEADS * 5, 1, PAGE, 2 * SIZE), torch.nan).to(stored or dtype)
    keys, values = pool.to(device).view(-1, PAGE, 2 * SIZE).split(SIZE, dim=2)
    # A fused projection, with rows of padding at its end.
    fused = torch.randn(TOKENS + 3, 5 * HEADS, SIZE).to(dtype).to(device)
    key, value = fused[:, HEADS : 2 * HEADS], fused[:, 3 * HEADS : 4 * HEADS]
    slots = np.stack([rng.permutation(BLOCKS * PAGE)[: TOKENS + 9] for _ in range(GROUPS)])
    groups, unit = torch.zeros(HEADS, dtype=torch.int64), HEADS
    own = torch.from_numpy(slots[0, :TOKENS]).to(device)
    homes = Homes.of_heads(torch.arange(HEADS, dtype=torch.int32, device=device), HEADS)
    offsets, more = torch.arange(HEADS), ()
    if grouped:
        groups, unit = torch.tensor([2, 0, 3]), UNIT
        offsets = torch.tensor([BLOCKS * UNIT + 1, 0, 3 * BLOCKS * UNIT])
        homes = Homes.unknown(HEADS, UNIT, device)
        homes.tell(offsets, groups)
        own, more = own.clone(), (torch.from_numpy(slots).to(device),)
    own[rng.choice(TOKENS, 5, replace=False)] = -1
    scales = (torch.tensor(0.3, device=device), torch.tensor(1.7, device=device))
    bases = torch.linalg.qr(torch.randn(len(TURNED), SIZE, SIZE))[0].contiguous().to(device)
    rotation = DeviceRotation(torch.tensor(TURNED, device=device), bases) if rotated else None
    store = HeadStore(homes, scales, rotation)
    store.write(key, value, keys, values, own, *more)

    wanted = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)
    exact = torch.zeros(len(keys), dtype=torch.bool)
    for head in range(HEADS):
        basis = bases[TURNED.index(head)].double() if rotated and head in TURNED else None
        turned = key[:, head].double()
        turned = key[:, head] if basis is None else (turned @ basis).float()
        for token in (own >= 0).nonzero().squeeze(1).tolist():
            slot = int(slots[groups[head], token])
            page = slot // PAGE * unit + int(offsets[head])
            exact[page] = basis is None
            for part, vector, scale in zip(
                wanted, (turned[token], value[token, head]), scales, strict=True
            ):
                if stored:
                    vector = (vector.float() / scale).to(stored)
                part[page, slot % PAGE] = vector
    torch.testing.assert_close(values.float(), wanted[1].float(), rtol=0, atol=0, equal_nan=True)
    for rows, most in ((exact, 0.0), (~exact, error)):
        torch.testing.assert_close(
            keys[rows].float(), wanted[0][rows].float(), rtol=most, atol=most, equal_nan=True
        )
    with Launches() as launches:
        store.write(key, value, keys, values, own, *more)
    assert launches.all == ["_store_kernel"]
