"""Sets up layers with masks on CUDA: which kernel serves them, with which scales and memory."""

import functools
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backends import flash_attn

from dam_vllm.attention.chosen_pages import ChosenPages
from dam_vllm.attention.cuda.attention import CUDAAttention, static_sets
from dam_vllm.attention.cuda.choices import Choices, rows_of
from dam_vllm.attention.cuda.choosing import choice_bytes
from dam_vllm.attention.cuda.dynamic import DeviceChoosing
from dam_vllm.attention.cuda.flash import Descales, Flash
from dam_vllm.attention.cuda.layer import DeviceLayer
from dam_vllm.attention.cuda.paged import Softmax
from dam_vllm.attention.cuda.scratch import Scratch
from dam_vllm.attention.cuda.tail import TailHeads
from dam_vllm.attention.dynamic_heads import DynamicHeads, ReusingHeads
from dam_vllm.engine.backend import guessed_tokens
from dam_vllm.engine.checks import admit
from dam_vllm.engine.kv_free.cuda_groups import CUDAGroups
from dam_vllm.engine.kv_free.head_groups import HeadGroups
from dam_vllm.engine.private import cache_scales, query_scale, scale_tensors
from dam_vllm.engine.serving import Serving
from dam_vllm.engine.shards import shard
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.options import DamOptions, OptionError

logger = init_logger(__name__)

# FlashAttention 3 reads an fp8 cache by 16 bytes and writes bfloat16 (hopper/flash_api.cpp).
FP8_VERSION, FP8_ALIGNMENT, FP8_OUTPUT = 3, 16, torch.bfloat16


def takes_flash(impl: Any, options: DamOptions) -> bool:
    """Whether FlashAttention serves a layer, else the Triton kernel does.

    Args:
        impl: the layer's implementation.
        options: validated options.

    Raises:
        OptionError: where FlashAttention was asked for and cannot serve.
    """
    fp8_served = (
        impl.vllm_flash_attn_version == FP8_VERSION
        and impl.head_size % FP8_ALIGNMENT == 0
        and impl.config.model_config.dtype == FP8_OUTPUT
    )
    unable = {
        "an fp8 KV cache without FlashAttention 3, bfloat16 and heads of a multiple of 16 channels":
            impl.quantised and not fp8_served,
        'granularity "token"': options.granularity == "token",
        "head size 256 on this GPU": impl.fa4_hd256,
    }  # fmt: skip
    reasons = [reason for reason, present in unable.items() if present]
    if options.kernel == "flash" and reasons:
        raise OptionError(
            f"--additional-config: dam.kernel is 'flash', which does not serve "
            f"{' and '.join(reasons)}; set it to 'auto' or 'triton'"
        )
    return options.kernel in ("flash", "auto") and not reasons


def device_layer(
    serving: Serving, index: int, attention: Any, page: int, decode_splits: int, scratch: Scratch
) -> DeviceLayer:
    """A layer with masks, ready to be planned and run.

    Args:
        serving: options and masks.
        index: the layer's, global.
        attention: vLLM's layer.
        page: tokens a page.
        decode_splits: see `Flash`.
        scratch: the worker's.
    """
    impl, masks, below = attention.impl, serving.masks, serving.dense_below
    device = scratch.query.device
    local, exact = shard(masks.kv_heads), serving.options.granularity == "token"
    key_scale, value_scale = cache_scales(attention)
    scale, softcap = impl.scale * key_scale, impl.logits_soft_cap or 0.0
    softmax, flash = Softmax(scale, softcap, value_scale), None
    if impl.flash:
        varlen = functools.partial(
            flash_attn.flash_attn_varlen_func, fa_version=impl.vllm_flash_attn_version
        )
        flash = Flash(varlen, decode_splits)
        if impl.quantised:
            flash = Flash(varlen, decode_splits, Descales(*scale_tensors(attention)))
            # FlashAttention multiplies by the factors itself; choices of pages and tails do not.
            softmax, scale = Softmax(impl.scale, softcap), scale * query_scale(attention)
    dynamic = DynamicHeads.of_layer(masks, index, local, page, below, scale, softcap, device)
    reusing = ReusingHeads.of_layer(masks, index, local, page, below, device)
    choosing, tails = None, local.tails(masks, index)
    if scratch.choices is not None:
        choosing = DeviceChoosing.of_layer(index, dynamic, reusing, scratch.choices)
    return DeviceLayer(
        static=static_sets(masks, index, local, page, below, exact, device),
        choosing=choosing,
        kv_heads=local.heads,
        softmax=softmax,
        flash=flash,
        index=index,
        rotation=impl.rotation if impl.rotates_later else None,
        tails=TailHeads(tails, Softmax(scale, softcap, value_scale)) if tails else None,
    )


def warm_up(sparse: CUDAAttention, layers: list[Any], dtype: torch.dtype) -> None:
    """Compiles all kernels that serving launches.

    Args:
        sparse: attention of the layers.
        layers: vLLM's.
        dtype: of activations.
    """
    impl, stored = layers[0].impl, sparse.layout.stored or dtype
    asked = stored if impl.quantised and impl.flash else dtype
    sparse.warm_up(impl.num_heads, impl.head_size, (asked, stored, dtype))
    vectors = torch.zeros(1, impl.num_heads, impl.head_size, dtype=dtype, device=sparse.device)
    for layer in layers:
        layer.impl.prepared(layer, vectors, planned=False)
        store = layer.impl.storing(layer)
        if store is not None:
            store.warm_up(impl.head_size, sparse.page, (dtype, stored))


def grouped(sparse: CUDAAttention, groups: HeadGroups, config: VllmConfig) -> CUDAGroups:
    """Attention of layers whose KV heads lie in several cache groups, its kernel compiled.

    Args:
        sparse: of all layers.
        groups: the groups.
        config: vLLM's configuration.
    """
    layers = {name: groups.attention[name] for name in sparse.layers}
    scales = {name: scale_tensors(layer)[1:] for name, layer in layers.items()}
    rotations = {name: layer.impl.rotation for name, layer in layers.items()}
    made = CUDAGroups(sparse, groups.groups, scales, rotations)
    dtype = config.model_config.dtype
    head_size = layers[groups.home].impl.head_size
    made.warm_up(head_size, (dtype, sparse.layout.stored or dtype))
    return made


def most_requests(config: VllmConfig) -> int:
    """Requests that a step is planned for at most.

    Queries that verify guessed tokens are planned as requests of their own.
    """
    graphs = config.compilation_config.max_cudagraph_capture_size
    each = 1 + guessed_tokens(config, admit(config))
    return max(config.scheduler_config.max_num_seqs * each, graphs or 0)


def worker_scratch(config: VllmConfig, device: torch.device) -> Scratch:
    """The worker's memory beside cache and weights, allocated by the first call.

    Args:
        config: vLLM's configuration, all layers built.
        device: where to.
    """
    layers = config.compilation_config.static_forward_context.values()
    impls: list[Any] = [getattr(layer, "impl", None) for layer in layers]
    ours = [impl for impl in impls if hasattr(impl, "scratch")]
    if ours[0].scratch is None:
        channels = max((impl.num_heads * impl.head_size for impl in ours if impl.flash), default=0)
        tokens, dtype = config.scheduler_config.max_num_batched_tokens, config.model_config.dtype
        choice, choices = _choices(config, ours, device)
        ours[0].scratch = Scratch(tokens, channels, dtype, device, choice, choices)
        chosen = choice + (choices.nbytes if choices else 0)
        logger.info(
            "DAM: plans and queries take %.0f MiB, choices of dynamic heads %.0f MiB",
            (ours[0].scratch.nbytes - chosen) / 2**20,
            chosen / 2**20,
        )
    return ours[0].scratch


def _choices(
    config: VllmConfig, impls: list[Any], device: torch.device
) -> tuple[int, Choices | None]:
    """Bytes for scores of a layer's dynamic heads, and memory for what all choose, in any step."""
    page, tokens = config.cache_config.block_size, config.scheduler_config.max_num_batched_tokens
    requests = most_requests(config)
    # A request's queries may begin and end inside a page.
    slots = min(tokens, tokens // page + 2 * requests)
    width = ceil_div(config.model_config.max_model_len, page)
    masks = admit(config).masks
    local = shard(masks.kv_heads)
    choosing = {layer: local.dynamic_heads(masks, layer) for layer in range(masks.layers)}
    rows = rows_of(choosing, ChosenPages.of_masks(masks, local).last)
    if not rows:
        return 0, None
    needed = [
        choice_bytes(len(impl.rotation.heads), slots, width, page, impl.num_queries_per_kv, page)
        for impl in impls
        if impl.rotation is not None
    ]
    return max(needed, default=0), Choices.of(rows, slots, width, device)
