"""Memory beside cache and weights: what is taken, by whom, and that it suffices."""

from types import SimpleNamespace

import pytest
import torch

from dam_vllm.attention.cuda import choosing, scratch, shares
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks


def test_plans_are_taken_anew_by_who_comes_again(monkeypatch):
    """vLLM sets all layers up twice where it measures CUDA graphs."""
    monkeypatch.setattr(scratch, "PLAN_BYTES", 4000)
    made = scratch.Scratch(0, 0, torch.float32, torch.device("cpu"))
    for _ in range(2):
        made.begin("first layers")
        first = made.take(600)
        made.begin("other layers")
        second = made.take(300)
        assert made.left() == 100
        assert first.data_ptr() == made._plans.data_ptr()
        assert second.data_ptr() == first.data_ptr() + 600 * 4
    made.begin("third layers")
    assert made.take(200).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_a_room_is_given_again_and_never_too_small():
    room = scratch.Room.new(1000, torch.device("cpu"))
    first, second = room.take(torch.float32, 3, 5), room.take(torch.uint8, 700)
    assert second.data_ptr() - first.data_ptr() == 256
    assert first.shape == (3, 5)
    beyond = room.take(torch.int32, 100)
    assert beyond.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    room.clear()
    assert room.take(torch.int64, 2).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("page", [16, 48, 128])
def test_choices_fit_into_what_the_largest_step_needs(rng, monkeypatch, page):
    """Choosing takes all from its room and asks `torch.empty` for nothing, whatever the step."""
    monkeypatch.setattr(choosing, "SCRATCH", 3 << 20)
    launch = type("Kernel", (), {"__getitem__": lambda self, grid: lambda *a, **given: None})()
    for name in ("_sum_chunks", "_share_pages"):
        monkeypatch.setattr(shares, name, launch)
    monkeypatch.setattr(shares, "page_arguments", lambda selector: {})
    for name in ("score_pages", "choose_pages"):
        monkeypatch.setattr(choosing, name, lambda *args: None)
    heads, members, slots, width = 3, 2, 40, 70
    room = scratch.Room.new(
        choosing.choice_bytes(heads, slots, width, page, members, page), torch.device("cpu")
    )
    assert room.nbytes < (8 << 20)
    outside = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **given: outside.append(a) or empty(*a, **given))
    dynamic = SimpleNamespace(
        heads=torch.arange(heads), static=None, channels=None, max_channels=8, scale=1.0,
        softcap=0.0, budgets=None,
    )  # fmt: skip
    ints = torch.zeros(slots, dtype=torch.int32)
    for few, narrow, most in [(slots, width, page), (slots, 1, page), (1, width, 1)] + [
        (*map(int, rng.integers(1, (slots + 1, width + 1))), page) for _ in range(20)
    ]:
        blocks = DeviceQueryBlocks(ints[:few], ints[:few], ints, ints, page, most)
        query, keys = empty(5, 7, members, 16), empty(9, page, 16)
        chosen = empty(heads, few, narrow, dtype=torch.uint8)
        choosing.choose_on_device(
            dynamic, chosen, ints[:heads], query, keys, None, blocks, narrow, None, room
        )
    assert outside == []


def test_a_choice_finds_all_of_the_room(monkeypatch):
    """Whatever the layer before took of it: query blocks are scored in as few parts."""
    launches = []
    monkeypatch.setattr(choosing, "score_pages", lambda *args: launches.append(1))
    monkeypatch.setattr(choosing, "choose_pages", lambda *args: None)
    monkeypatch.setattr(choosing, "share_pages", lambda *args: None)
    heads, members, slots, width, page = 3, 2, 40, 70, 16
    needed = choosing.choice_bytes(heads, slots, width, page, members, 1)
    room, ints = (
        scratch.Room.new(needed, torch.device("cpu")),
        torch.zeros(slots, dtype=torch.int32),
    )
    dynamic = SimpleNamespace(
        heads=torch.arange(heads), static=None, channels=None, max_channels=8, scale=1.0,
        softcap=0.0, budgets=None,
    )  # fmt: skip
    blocks = DeviceQueryBlocks(ints, ints, ints, ints, page, 1)
    for _ in range(2):
        choosing.choose_on_device(
            dynamic, torch.empty(heads, slots, width), ints[:heads], torch.empty(5, 7, members, 16),
            torch.empty(9, page, 16), None, blocks, width, None, room,
        )  # fmt: skip
    assert len(launches) == 2
