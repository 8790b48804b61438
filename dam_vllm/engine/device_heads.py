"""What a masked layer needs on CUDA: its heads' tables on the device, its kernel, its rotation."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends import flash_attn

from dam_vllm.attention.cuda.flash import Varlen
from dam_vllm.attention.cuda.layer import DeviceLayer, HeadSet
from dam_vllm.attention.cuda.paged import Softmax
from dam_vllm.attention.cuda.select import DeviceDynamic
from dam_vllm.attention.cuda.token_bits import TokenBits
from dam_vllm.attention.rotation import HeadRotation
from dam_vllm.engine.checks import Serving
from dam_vllm.engine.counters import COUNTS, counting
from dam_vllm.engine.dynamic import dynamic_heads
from dam_vllm.engine.shards import Shard, shard
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.page_tables import PageSelector
from dam_vllm.options import DamOptions, OptionError


@dataclass(frozen=True)
class LayerHeads:
    """A masked layer on this worker.

    Attributes:
        layer: its sparse attention.
        rotation: of its dynamic heads, or None.
        dense_until: positions before it read every page, in tokens.
    """

    layer: DeviceLayer
    rotation: HeadRotation | None
    dense_until: int


def layer_heads(
    serving: Serving, index: int, attention: Any, page: int, device: torch.device
) -> LayerHeads:
    """Sets up a layer and compiles its kernels.

    Args:
        serving: options and masks.
        index: global layer index.
        attention: vLLM's layer, weights loaded.
        page: tokens a page.
        device: where to.

    Returns:
        The layer.

    Raises:
        OptionError: if the kernel that was asked for cannot serve it.
    """
    impl, local = attention.impl, shard(serving.masks.kv_heads)
    scales = (attention._k_scale_float, attention._v_scale_float) if impl.quantised else (1.0, 1.0)
    softmax = Softmax(impl.scale * scales[0], impl.logits_soft_cap, scales[1])
    fixed = _fixed_sets(serving, index, local, page, device)
    chosen = _dynamic_set(serving, index, local, page, softmax, device)
    layer = DeviceLayer(
        sets=[*fixed, *([chosen] if chosen else [])],
        kv_heads=local.stop - local.start,
        softmax=softmax,
        varlen=_flash(impl, serving.options),
    )
    dtype = impl.config.model_config.dtype
    stored = current_platform.fp8_dtype() if impl.quantised else dtype
    layer.warm_up(impl.num_heads, impl.head_size, page, (dtype, stored))
    if counting(impl.config):
        layer = replace(layer, counted=COUNTS.add_plan)
    rotation = None
    if chosen and serving.masks.dynamic is not None:
        bases = serving.masks.dynamic.rotations[index, local.start : local.stop][list(chosen.ids)]
        rotation = HeadRotation(chosen.heads.long(), torch.from_numpy(bases).to(device))
    tables = local.tables(serving.masks, index, page)
    dense_until = PageSelector([tables], serving.options.dense_below)
    return LayerHeads(layer, rotation, dense_until.dense_blocks * dense_until.query_block)


def _fixed_sets(
    serving: Serving, index: int, local: Shard, page: int, device: torch.device
) -> list[HeadSet]:
    """Static and dense heads, apart where static ones have token masks."""
    masks, options = serving.masks, serving.options
    modes = masks.modes[index, local.start : local.stop]
    fixed = [head for head, mode in enumerate(modes) if mode != HeadMode.DYNAMIC]
    groups: list[tuple[list[int], TokenBits | None]] = [(fixed, None)]
    if options.granularity == "token":
        group = masks.heads // masks.kv_heads
        queries = slice(local.start * group, local.stop * group)
        exact = TokenBits.of_layer(masks, index, queries, options.dense_below, device)
        dense = [head for head in fixed if modes[head] == HeadMode.DENSE]
        groups = [([head for head in fixed if head not in dense], exact), (dense, None)]
    tables = local.tables(masks, index, page)
    return [
        HeadSet(
            ids=tuple(ids),
            heads=torch.tensor(ids, dtype=torch.int32, device=device),
            selector=PageSelector([tables.take(ids)], options.dense_below, device),
            exact=bits,
        )
        for ids, bits in groups
        if ids
    ]


def _dynamic_set(
    serving: Serving, index: int, local: Shard, page: int, softmax: Softmax, device: torch.device
) -> HeadSet | None:
    """Dynamic heads, or None where the layer has none."""
    heads = dynamic_heads(
        serving.masks,
        index,
        local,
        page,
        serving.options.dense_below,
        softmax.scale,
        softmax.softcap,
        device=device,
    )
    if heads is None:
        return None
    ids = local.dynamic_heads(serving.masks, index)
    dynamic = DeviceDynamic.of(heads, ids)
    return HeadSet(tuple(ids), dynamic.heads, dynamic.static, dynamic)


def _flash(impl: Any, options: DamOptions) -> Varlen | None:
    """FlashAttention as vLLM picked it, or None for the Triton kernel."""
    unable = {
        "an fp8 KV cache": impl.quantised,
        'granularity "token"': options.granularity == "token",
        "head size 256 on this GPU": impl.fa4_hd256,
    }
    reasons = [reason for reason, present in unable.items() if present]
    if options.kernel == "flash" and reasons:
        raise OptionError(
            f"--additional-config: dam.kernel is 'flash', which does not serve "
            f"{' and '.join(reasons)}; set it to 'auto' or 'triton'"
        )
    if options.kernel == "triton" or reasons:
        return None
    return functools.partial(
        flash_attn.flash_attn_varlen_func, fa_version=impl.vllm_flash_attn_version
    )
