"""Storing keys and values of a layer: one launch, which turns the keys of dynamic heads.

Stands in for `reshape_and_cache_flash` of vLLM (csrc/cache_kernels.cu), which knows one slot a
token and no basis.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.rotation import BLOCK, CHUNK, DeviceRotation, to_fp8, turned


@dataclass(frozen=True)
class HeadStore:
    """Writes a layer's new keys and values into its heads' pages.

    Attributes:
        homes: where the layer's KV heads lie, in their order.
        scales: float32, one number each: factors of an fp8 cache's keys and values.
        rotation: of the layer's dynamic heads, or None.
    """

    homes: Homes
    scales: tuple[torch.Tensor, torch.Tensor]
    rotation: DeviceRotation | None

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        own: torch.Tensor,
        slots: torch.Tensor | None = None,
    ) -> None:
        """Writes them.

        Args:
            key: [at least tokens, kv_heads, head_size], the last dimension contiguous.
            value: likewise.
            keys: [virtual pages, page, head_size], in the key's dtype or float8_e4m3fn; written.
            values: likewise.
            own: int64 [tokens], slots of one of the groups, vLLM's; negative ones are padding.
            slots: int64 [groups, at least tokens], of all groups, where there are several; what
                stands for padding is not read.
        """
        _, heads, size = key.shape
        tokens, homes = len(own), self.homes
        bases, rows = (None, None)
        if self.rotation is not None:
            bases, rows = self.rotation.rotations, self.rotation.rows(heads)
        _store_kernel[(triton.cdiv(tokens, BLOCK), heads)](
            key, value, keys, values, own, slots, homes.offsets, homes.groups, *self.scales,
            bases, rows, *key.stride()[:2], *value.stride()[:2], *keys.stride()[:2],
            *values.stride()[:2], 0 if slots is None else slots.stride(0), homes.scale, tokens,
            PAGE=keys.shape[1], SIZE=size, SIZE_PADDED=max(16, triton.next_power_of_2(size)),
            BLOCK=BLOCK, CHUNK=CHUNK, FP8=keys.dtype == torch.float8_e4m3fn,
        )  # fmt: skip

    def warm_up(
        self,
        size: int,
        page: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        slots: torch.Tensor | None = None,
    ) -> None:
        """Compiles the kernel.

        Args:
            size: channels a head.
            page: tokens a page.
            dtypes: of keys and of the cache.
            slots: as for `write`.
        """
        device, heads = self.homes.offsets.device, len(self.homes.offsets)
        key = torch.zeros(1, heads, size, dtype=dtypes[0], device=device)
        pages = torch.zeros(heads, page, 2 * size, device=device).to(dtypes[1])
        own = torch.full((1,), -1, dtype=torch.int64, device=device)
        keys, values = pages.split(size, dim=2)
        self.write(key, key, keys, values, own, slots)


# Slots are cut out of vLLM's buffers anywhere; rows of vectors are multiples of 16 bytes.
@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["own_ptr", "slot_ptr", "key_scale_ptr", "value_scale_ptr"],
)
def _store_kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, own_ptr, slot_ptr, home_ptr, group_ptr,
    key_scale_ptr, value_scale_ptr, basis_ptr, row_ptr,
    key_token, key_head, value_token, value_head, keys_page, keys_row, values_page, values_row,
    slot_stride, unit, tokens,
    PAGE: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one head."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(own_ptr + token, mask=token < tokens, other=-1)
    present = slot >= 0
    if group_ptr is not None:
        group = tl.load(group_ptr + head).to(tl.int64)
        slot = tl.load(slot_ptr + group * slot_stride + token, mask=present, other=0)
    page, row = slot // PAGE * unit + tl.load(home_ptr + head), slot % PAGE
    channel = tl.arange(0, SIZE_PADDED)
    held = present[:, None] & (channel < SIZE)[None, :]

    source = value_ptr + head * value_head + token[:, None] * value_token + channel[None, :]
    target = values_ptr + (page * values_page + row * values_row)[:, None] + channel[None, :]
    _put(target, tl.load(source, mask=held, other=0.0), held, value_scale_ptr, FP8)

    source = key_ptr + head * key_head + token[:, None] * key_token
    target = keys_ptr + (page * keys_page + row * keys_row)[:, None] + channel[None, :]
    if row_ptr is None:
        plain = tl.load(source + channel[None, :], mask=held, other=0.0)
        _put(target, plain, held, key_scale_ptr, FP8)
    else:
        which = tl.load(row_ptr + head)
        if which < 0:
            plain = tl.load(source + channel[None, :], mask=held, other=0.0)
            _put(target, plain, held, key_scale_ptr, FP8)
        else:
            basis = basis_ptr + which * SIZE * SIZE
            vectors = turned(source, basis, present, SIZE, SIZE_PADDED, BLOCK, CHUNK)
            _put(target, vectors, held, key_scale_ptr, FP8)


@triton.jit
def _put(target, vectors, held, scale_ptr, FP8: tl.constexpr):
    """Stores vectors; in an fp8 cache over a scale."""
    if FP8:
        vectors = to_fp8(vectors.to(tl.float32) / tl.load(scale_ptr))
    tl.store(target, vectors.to(target.dtype.element_ty), mask=held)
