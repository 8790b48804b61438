"""DAM on a GPU as it serves: a step of a model whose layers are the sets of inputs."""

from collections.abc import Mapping, Sequence

import torch

from dam_vllm.attention.cuda.attention import CUDAAttention, Limits
from dam_vllm.attention.cuda.choices import Choices
from dam_vllm.attention.cuda.choosing import choice_bytes
from dam_vllm.attention.cuda.dynamic import DeviceChoosing
from dam_vllm.attention.cuda.flash import Flash
from dam_vllm.attention.cuda.layer import DeviceLayer, HeadSet
from dam_vllm.attention.cuda.paged import Softmax
from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.rotation import DeviceRotation
from dam_vllm.attention.cuda.scratch import Scratch
from dam_vllm.attention.cuda.store import HeadStore
from dam_vllm.attention.cuda.tail import TailHeads
from dam_vllm.attention.dynamic_heads import DynamicHeads, ReusingHeads
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.bench.gpu_case import DTYPE, Case, Geometry, Inputs
from dam_vllm.bench.gpu_timing import Call
from dam_vllm.bench.scattered import Selection, Spread
from dam_vllm.masks.budget import Budget, TopK
from dam_vllm.masks.page_tables import PageSelector

# Channels that score, and splits of keys in decoding as vLLM allows them (flash_attn.py).
CHANNELS, SPLITS = 32, 32
# One layer chooses pages for so many.
ANCHORED = 4


def dam_calls(
    case: Case,
    where: Geometry,
    inputs: Sequence[Inputs],
    selection: Selection,
    flash: object | None,
) -> list[Call]:
    """A step, layer by layer; the first layer's call makes the plan of all.

    Where heads choose, the new tokens' queries are rotated and their keys and values stored too,
    as in every layer that has such heads; keys are rotated where they are stored.

    Args:
        case: the geometry.
        where: the same on the device.
        inputs: of each layer.
        selection: what each layer reads.
        flash: FlashAttention's function, run on virtual pages, or None for the Triton kernel.
    """
    device = where.starts.device
    heads = torch.arange(selection.choosing, device=device)
    # It turns nothing, so that stored keys are those that the cache holds already.
    basis = torch.eye(case.head_size, device=device).expand(len(heads), -1, -1).contiguous()
    rotation, factor = DeviceRotation(heads, basis), torch.ones((), device=device)
    layers = _layers(case, selection, flash, len(inputs), rotation)
    names = [f"layer {number}" for number in range(len(inputs))]
    served = dict(zip(names, layers, strict=True))
    attention = _attention(case, selection, served, device)
    plan = attention.plan(
        Step(
            query_start_loc=where.starts,
            query_start_loc_cpu=where.starts.cpu(),
            seq_lens=where.lens,
            block_table=inputs[0].block_table,
            tokens=case.rows,
            max_query_len=case.queries,
            max_seq_len=case.tokens,
        )
    )
    store = HeadStore(Homes.of_heads(where.every, case.kv_heads), (factor, factor), rotation)
    slots = _token_slots(case, inputs[0].block_table)
    output = torch.full_like(inputs[0].query, torch.nan)

    def call_of(name: str, layer: DeviceLayer, each: Inputs) -> Call:
        turns = layer.choosing is not None and layer.choosing.dynamic is not None
        key, value = (_new_tokens(case, part) for part in (each.key, each.value))
        pages = attention.layout.keys_and_values(each.cache)

        def call() -> torch.Tensor:
            if turns:
                store.write(key, value, *pages, slots)
            attention.run(plan, name, each.query, each.cache, output)
            return output

        return call

    return [call_of(*each) for each in zip(names, layers, inputs, strict=True)]


def _attention(
    case: Case, selection: Selection, served: Mapping[str, DeviceLayer], device: torch.device
) -> CUDAAttention:
    return CUDAAttention(
        served=served,
        page=case.page,
        layout=KVLayout(keys_by_channel=False),
        limits=Limits(case.batch, case.rows, case.tokens),
        scratch=_scratch(case, selection, device),
        dense_below=0,
        counts=None,
        device=device,
    )


def _new_tokens(case: Case, vectors: torch.Tensor) -> torch.Tensor:
    """The new tokens' part of [batch, kv_heads, tokens, head_size]: [rows, kv_heads, head_size]."""
    return vectors[:, :, case.tokens - case.queries :].transpose(1, 2).flatten(0, 1)


def _token_slots(case: Case, block_table: torch.Tensor) -> torch.Tensor:
    """Where the new tokens lie in the cache: int64 [rows], as vLLM's slots."""
    at = torch.arange(case.tokens - case.queries, case.tokens, device=block_table.device)
    return (block_table[:, at // case.page] * case.page + at % case.page).long().flatten()


def _slots(case: Case) -> int:
    return case.batch * (len(case.query_blocks) * case.own + 1)


def _scratch(case: Case, selection: Selection, device: torch.device) -> Scratch:
    channels, choice = case.heads * case.head_size, 0
    if selection.choosing:
        most = min(case.queries, case.page)
        choice = choice_bytes(
            selection.choosing, _slots(case), case.pages, case.page, case.heads_per_kv, most
        )
    return Scratch(case.rows, channels, DTYPE, device, choice)


def _layers(
    case: Case, selection: Selection, flash: object | None, count: int, rotation: DeviceRotation
) -> list[DeviceLayer]:
    """The layers; where pages are reused, one in `ANCHORED` chooses and the next ones follow."""
    device = rotation.heads.device
    choosing = list(range(selection.choosing))
    ids = range(selection.choosing, case.kv_heads)
    static = HeadSet(
        ids=tuple(ids),
        heads=torch.tensor(ids, dtype=torch.int32, device=device),
        tables=selection.tables.take(slice(selection.choosing, None)),
    )
    choices = Choices.of({(0, head): head for head in choosing}, _slots(case), case.pages, device)
    chooses = follows = None
    if choosing:
        anyway = PageSelector([selection.tables.take(choosing)], device=device)
        budgets: list[Budget] = [TopK(selection.chosen, 0, selection.chosen)] * len(choosing)
        dynamic = DynamicHeads(
            [CHANNELS] * len(choosing), budgets, anyway, case.scale, ids=choosing
        )
        reusing = ReusingHeads(choosing, [(0, head) for head in choosing], anyway)
        chooses = DeviceChoosing.of_layer(0, dynamic, None, choices)
        follows = DeviceChoosing.of_layer(1, None, reusing, choices)
    if selection.spread != Spread.REUSE:
        follows = chooses
    tails = None
    if selection.spread == Spread.TAIL:
        tails = TailHeads(range(case.kv_heads), Softmax(case.scale))
    return [
        DeviceLayer(
            static=[static],
            choosing=each,
            kv_heads=case.kv_heads,
            softmax=Softmax(case.scale),
            flash=None if flash is None else Flash(flash, SPLITS),  # type: ignore[arg-type]
            rotation=rotation if each is not None and each.dynamic is not None else None,
            tails=tails,
        )
        for each in (follows if number % ANCHORED else chooses for number in range(count))
    ]
