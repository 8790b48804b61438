"""Storing keys and values of a layer whose KV heads lie in several cache groups: one launch.

Follows `reshape_and_cache_flash` of vLLM (csrc/cache_kernels.cu), which knows one slot a token.
"""

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.fp8 import to_fp8
from dam_vllm.attention.cuda.places import Homes


def store_heads(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own: torch.Tensor,
    slots: torch.Tensor,
    homes: Homes,
    scales: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Writes new keys and values into their heads' pages.

    Args:
        key: [at least tokens, kv_heads, head_size], the last dimension contiguous.
        value: likewise.
        keys: [virtual pages, page, head_size], in the key's dtype or float8_e4m3fn; written.
        values: likewise.
        own: int64 [tokens], slots of one of the groups, vLLM's; negative ones are padding.
        slots: int64 [groups, at least tokens], of all groups; what stands for padding is not read.
        homes: where the layer's KV heads lie, in their order.
        scales: float32, one number each: factors of an fp8 cache's keys and values.
    """
    _, heads, size = key.shape
    _store_kernel[(len(own),)](
        key, value, keys, values, own, slots, homes.offsets, homes.groups, *scales,
        *key.stride()[:2], *value.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
        slots.stride(0), homes.scale, PAGE=keys.shape[1], HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads), SIZE=size,
        SIZE_PADDED=triton.next_power_of_2(size), FP8=keys.dtype == torch.float8_e4m3fn,
    )  # fmt: skip


# Slots are cut out of vLLM's buffers anywhere; rows of vectors are multiples of 16 bytes.
@triton.jit(
    do_not_specialize_on_alignment=[
        "own_ptr", "slot_ptr", "key_scale_ptr", "value_scale_ptr"
    ]
)  # fmt: skip
def _store_kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, own_ptr, slot_ptr, home_ptr, group_ptr,
    key_scale_ptr, value_scale_ptr,
    key_token, key_head, value_token, value_head, keys_page, keys_row, values_page, values_row,
    slot_stride, unit,
    PAGE: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(own_ptr + token) < 0:
        return
    head, channel = tl.arange(0, HEADS_PADDED), tl.arange(0, SIZE_PADDED)
    present = head < HEADS
    group = tl.load(group_ptr + head, mask=present, other=0).to(tl.int64)
    slot = tl.load(slot_ptr + group * slot_stride + token, mask=present, other=0)
    page = slot // PAGE * unit + tl.load(home_ptr + head, mask=present, other=0)
    held = present[:, None] & (channel < SIZE)[None, :]
    _store(
        key_ptr + token * key_token + head[:, None] * key_head + channel[None, :],
        keys_ptr + (page * keys_page + slot % PAGE * keys_row)[:, None] + channel[None, :],
        held, key_scale_ptr, FP8,
    )  # fmt: skip
    _store(
        value_ptr + token * value_token + head[:, None] * value_head + channel[None, :],
        values_ptr + (page * values_page + slot % PAGE * values_row)[:, None] + channel[None, :],
        held, value_scale_ptr, FP8,
    )  # fmt: skip


@triton.jit
def _store(source, target, held, scale_ptr, FP8: tl.constexpr):
    """Copies vectors; to an fp8 cache over a scale."""
    vectors = tl.load(source, mask=held, other=0.0)
    if FP8:
        vectors = to_fp8(vectors.to(tl.float32) / tl.load(scale_ptr))
    tl.store(target, vectors.to(target.dtype.element_ty), mask=held)
