"""A step of several layers: planned together, served by either kernel, few launches a layer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dam_vllm.attention.cuda import counts as counting
from dam_vllm.attention.cuda import (
    flash,
    means,
    merge,
    paged,
    plan,
    rotation,
    score,
    select,
    shares,
    tail,
)
from dam_vllm.attention.cuda.choices import rows_of
from dam_vllm.attention.oracle import page_mask
from tests.unit.attention.cuda.launches import Launches, compiled, new, signature
from tests.unit.attention.cuda.layer_steps import (
    ANCHORS,
    BLOCKS,
    DENSE,
    DYNAMIC,
    HEADS,
    KV_HEADS,
    MIXED,
    MODES,
    PAGE,
    SIZE,
    STATIC,
    STEPS,
    attention,
    chosen,
    expected,
    layer_masks,
    make_step,
    rotate_queries,
    run,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def masks(random_masks):
    return layer_masks(random_masks)


@pytest.mark.parametrize("requests", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(("flash", "plans"), [(False, None), (True, None), (True, 4000)])
@pytest.mark.parametrize("rotates", [False, True])
def test_layers_planned_together_equal_the_oracle(
    rng, masks, device, requests, flash, plans, rotates
):
    torch.manual_seed(int(rng.integers(2**31)))
    served = attention(masks, device, flash, plans, rotates=rotates)
    bundles = {id(run.bundle) for run in served._runs.values()}
    assert (len(bundles) > 1) == (plans is not None)
    made = make_step(rng, device, requests)
    found = run(served, made)
    if rotates:
        rotate_queries(masks, made)
    for layer in range(masks.layers):
        torch.testing.assert_close(found[layer], expected(masks, made, layer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("requests", [MIXED, STEPS["decode"]], ids=["mixed", "decode"])
@pytest.mark.parametrize(("flash", "plans"), [(False, None), (True, 4000)])
def test_heads_in_several_groups_equal_the_oracle(rng, masks, device, requests, flash, plans):
    """Each head's pages lie where its own group's block table says, all in one pool."""
    torch.manual_seed(int(rng.integers(2**31)))
    made = make_step(rng, device, requests)
    groups, unit, blocks = 3, 2, BLOCKS + 11
    group = torch.from_numpy(rng.integers(0, groups, (masks.layers, KV_HEADS)))
    place = torch.from_numpy(rng.permutation(group.numel())).view_as(group)
    offset = place // unit * (blocks * unit) + place % unit
    pool = torch.full((-(-group.numel() // unit) * blocks * unit, 1, PAGE, 2 * SIZE), torch.nan)
    old = made.step.block_table.cpu()
    tables = torch.full((groups, *old.shape), 2**30, dtype=torch.int32)
    for number in range(groups):
        new = torch.from_numpy(rng.permutation(blocks)).int()
        held = old < BLOCKS
        tables[number][held] = new[old[held].long()]
        for layer, head in (group == number).nonzero().tolist():
            pages = new[:BLOCKS].long() * unit + offset[layer, head]
            pool[pages] = made.caches[layer, :, head, None].cpu()
    served = attention(masks, device, flash, plans, unit)
    served.tell(offset, group)
    made.step = replace(made.step, block_table=tables.to(device))
    made.caches = pool.to(device).expand(masks.layers, *pool.shape)
    found = run(served, made)
    for layer in range(masks.layers):
        torch.testing.assert_close(found[layer], expected(masks, made, layer), rtol=1e-4, atol=1e-4)


def test_counts_are_those_of_the_definition(rng, masks, device, monkeypatch):
    """Heads of all modes, in bundles; what followers chose is their anchors'."""
    monkeypatch.setattr(flash, "_call", lambda *args, **given: None)
    torch.manual_seed(int(rng.integers(2**31)))
    counts = counting.DeviceCounts(range(len(MODES)), KV_HEADS, 0, device)
    served = attention(masks, device, True, 4000, counts=counts)
    made = make_step(rng, device, ((300, 1), (65, 1), (211, 150), (5, 5)), padding=3)
    run(served, made)
    wanted = np.zeros((2, 2, len(MODES), KV_HEADS), int)
    for layer, modes in enumerate(MODES):
        first = 0
        for (stop, count), stored in zip(made.requests, made.keys, strict=True):
            rows = slice(first, first + count)
            first += count
            for head, mode in enumerate(modes):
                size = 128 if mode in (STATIC, DENSE) else PAGE
                own = head * HEADS // KV_HEADS
                seen = page_mask(masks, layer, stop - count, stop, PAGE, 0, size)[own]
                if size == PAGE:
                    anchor = (layer, head) if mode == DYNAMIC else ANCHORS[layer, head]
                    seen = seen | chosen(masks, made, anchor, rows, stored)
                # A query block reads as its last query does.
                ends = [min(at | size - 1, stop - 1) for at in range(stop - count, stop)]
                last = np.pad(seen, ((0, 0), (0, -stop % PAGE)))[np.array(ends) - stop + count]
                pages = last.reshape(count, -1, PAGE).any(axis=2).sum()
                dense = sum(end // PAGE + 1 for end in ends)
                wanted[int(count == 1), :, layer, head] += (pages, dense)
    told = counts.report()
    for phase, name in enumerate(("prefill", "decode")):
        assert told["dense"][name] == wanted[phase, 1].tolist()
        # Rounding may decide for one page or another, which a query block of 32 reads.
        assert np.abs(np.array(told["read"][name]) - wanted[phase, 0]).max() <= 2 * PAGE
        assert sum(told["steps"][name]) == 1
        density = wanted[phase, 0].sum() / wanted[phase, 1].sum()
        assert told["densities"][name] == pytest.approx(density, rel=0.01)


def test_padding_is_no_query(rng, masks, device):
    torch.manual_seed(int(rng.integers(2**31)))
    made = make_step(rng, device, STEPS["prefill"], padding=11)
    found = run(attention(masks, device, True), made)[0]
    wanted = expected(masks, made, 0)
    torch.testing.assert_close(found[:-11], wanted, rtol=1e-4, atol=1e-4)
    assert found[-11:].isnan().all()


@pytest.mark.parametrize(("requests", "most"), [("prefill", 3), ("decode", 2)])
def test_static_heads_take_few_launches(rng, masks, device, requests, most):
    """Besides the plan, one a step for all layers: copies, and FlashAttention itself."""
    masks.modes[:] = STATIC
    served, made = attention(masks, device, True), make_step(rng, device, STEPS[requests])
    launches = Launches()
    run(served, made, launches)
    assert launches.triton.count("_plan_kernel") == 1
    assert len(launches.all) - 1 <= most * masks.layers
    # Query, key and value come as slices of one projection, so that none is contiguous.
    wide = torch.empty(len(MODES), made.step.tokens, HEADS + 2, SIZE, device=device)
    made.query = wide[:, :, :HEADS].copy_(made.query)
    launches = Launches()
    run(served, made, launches)
    assert len(launches.all) - 1 <= most * masks.layers


@pytest.mark.parametrize("requests", ["prefill", "decode"])
@pytest.mark.parametrize("kernel", ["flash", "triton"])
def test_rotation_takes_the_place_of_a_copy(rng, masks, device, requests, kernel):
    """By FlashAttention no launch more, where queries come as slices of one projection."""
    made = make_step(rng, device, STEPS[requests])
    wide = torch.empty(len(MODES), made.step.tokens, HEADS + 2, SIZE, device=device)
    made.query = wide[:, :, :HEADS].copy_(made.query)
    counts = []
    for rotates in (False, True):
        launches = Launches()
        run(attention(masks, device, kernel == "flash", rotates=rotates), made, launches)
        counts.append(launches.all)
    without, turned = counts
    layers = (masks.modes == DYNAMIC).any(axis=1).sum()
    assert turned.count("_rotate") == layers
    assert len(turned) == len(without) + (layers if kernel == "triton" else 0)


LATER = (((65, 1), (200, 50), (7, 7)), ((300, 1),), ((40, 1),) * 5, ((7, 7), (9, 3), (60, 31)))
MODULES = (counting, flash, means, merge, paged, plan, rotation, score, select, shares, tail)
KERNELS = {
    (module, name): kernel
    for module in MODULES
    for name, kernel in vars(module).items()
    if hasattr(kernel, "arg_names")
}


@pytest.mark.parametrize("flash", [True, False])
def test_serving_launches_nothing_new(rng, random_masks, device, monkeypatch, flash):
    """Whatever a step holds, Triton finds each kernel compiled by the warm-up."""
    seen, masks = set(), layer_masks(random_masks, tails=True)
    masks.tails[1] = 0
    if device.type == "cpu":
        for (module, name), kernel in KERNELS.items():
            monkeypatch.setattr(module, name, signature(kernel, seen))
    counts = counting.DeviceCounts(range(len(MODES)), KV_HEADS, 0, device)
    served = attention(masks, device, flash, counts=counts, rotates=True)
    served.warm_up(HEADS, SIZE, (torch.float32,) * 3)
    assert not counts.pages.any()
    assert not served._means._beside
    if device.type == "cuda":
        before = compiled(KERNELS.values())
        for requests in LATER:
            run(served, make_step(rng, device, requests))
        assert compiled(KERNELS.values()) == before > 0
        return
    warmed = seen.copy()
    assert warmed
    for requests in LATER:
        run(served, make_step(rng, device, requests))
    # vLLM may round a request's blocks up.
    wide = make_step(rng, device, LATER[0])
    table = torch.nn.functional.pad(wide.step.block_table, (0, 1))
    wide.step = replace(wide.step, block_table=table)
    run(served, wide)
    assert new(seen, warmed) == []


def test_rows_of_choices_live_as_long_as_they_are_read():
    last = {(0, 1): 5, (1, 0): 1, (1, 2): 3}
    choosing = {0: [1], 1: [0, 2], 2: [0], 3: [1, 2], 6: [0]}
    rows = rows_of(choosing, last)
    for layer in range(7):
        # Choices that are written or read in this layer lie apart.
        alive = [
            row for anchor, row in rows.items()
            if anchor[0] <= layer <= max(anchor[0], last.get(anchor, 0))
        ]  # fmt: skip
        assert len(set(alive)) == len(alive)
    assert rows.keys() == {(layer, head) for layer, heads in choosing.items() for head in heads}
    assert max(rows.values()) == 3
