"""Decides which KV heads free pages, and tells vLLM by the specs of their caches.

It happens once a worker, when weights are loaded: all layers exist then, and vLLM collects the
specs afterwards. Under tensor parallelism every rank decides alike, from all heads.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import replace_as

from dam_vllm.engine.checks import admit, may_free_heads
from dam_vllm.engine.kv_free.bounds import Bounds, HeadBounds, head_bounds
from dam_vllm.engine.kv_free.capacity import Freeing, choose_freeing, freed_first
from dam_vllm.engine.kv_free.head_groups import split_layers
from dam_vllm.engine.kv_free.spec import BoundedAttentionSpec
from dam_vllm.engine.serving import Serving, logger
from dam_vllm.engine.shards import shard
from dam_vllm.masks.sharding import shards
from dam_vllm.options import OptionError

FULL_ONLY = ("sliding_window", "attention_chunk_size", "non_causal")


def free_kv_heads(config: VllmConfig) -> None:
    """Chooses units that free pages and gives them specs; logs what was chosen, or why nothing.

    Args:
        config: vLLM's configuration, all layers built.

    Raises:
        OptionError: if pages are to be freed, by an option that was set, and cannot be.
    """
    serving = admit(config)
    asked, reason = serving.options.kv_free, _reason_to_keep(config, serving)
    if reason is not None and asked in ("layer", "head"):
        raise OptionError(
            f"--additional-config: dam.kv_free is {asked!r}, and nothing can be freed: {reason}; "
            f"set it to 'auto' or 'off'"
        )
    if reason is None:
        page = config.cache_config.block_size
        heads = head_bounds(serving.masks, page, serving.dense_below)
        choices = _choices(config, serving, heads)
        if choices:
            _apply(config, serving, heads, choices[0])
            _log(serving, choices)
            return
        reason = "no choice of bounded KV heads gains enough"
    if get_tensor_model_parallel_rank() == 0:
        logger.info("DAM keeps all KV pages: %s", reason)


def _reason_to_keep(config: VllmConfig, serving: Serving) -> str | None:
    """Why nothing may be freed, or None."""
    if serving.options.kv_free == "off":
        return "kv_free is off"
    if serving.options.kernel == "naive":
        return "the naive kernel reads every page"
    if config.kv_transfer_config is not None:
        return f"KV connector {config.kv_transfer_config.kv_connector} moves whole requests"
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        return "the hybrid KV-cache manager is off"
    if config.speculative_config is not None:
        return "draft layers or tokens of speculative decoding"
    return _odd_layer(config.compilation_config.static_forward_context, serving)


def _odd_layer(attention: Mapping[str, Any], serving: Serving) -> str | None:
    """Names a layer that is not plain full attention with masks, if there is one."""
    types = serving.masks.header.layer_types
    shapes = set()
    for name, layer in attention.items():
        index = extract_layer_index(name)
        impl: Any = getattr(layer, "impl", None)
        if not hasattr(impl, "groups") or layer.kv_sharing_target_layer_name is not None:
            return f"{name} is not plain attention"
        if index >= len(types) or types[index] != "full" or impl.windowed:
            return f"{name} is not full attention with masks"
        shapes.add((layer.num_kv_heads, layer.head_size, layer.kv_cache_torch_dtype))
    return "layers have KV caches of different shapes" if len(shapes) > 1 else None


def _choices(config: VllmConfig, serving: Serving, heads: HeadBounds) -> list[Freeing]:
    ranks = shards(serving.masks.kv_heads, get_tensor_model_parallel_world_size())
    return choose_freeing(
        heads,
        [slice(rank.start, rank.stop) for rank in ranks],
        config.model_config.max_model_len,
        config.max_in_flight_tokens,
        may_free_heads(serving.options),
    )


def _log(serving: Serving, choices: list[Freeing]) -> None:
    if get_tensor_model_parallel_rank() != 0:
        return
    local = shard(serving.masks.kv_heads)
    words = [choice.describe(local.stop - local.start) for choice in choices]
    bounds = choices[0].bounds
    logger.info(
        "DAM frees KV pages (kv_free: %s): %s; sinks of %d and a window of %d tokens are kept, and "
        "everything below %d; not taken: %s",
        serving.options.kv_free,
        words[0],
        bounds.sinks * bounds.page,
        bounds.window * bounds.page + bounds.query_block,
        bounds.start,
        ", ".join([*words[1:], "nothing freed, 1.00x"]),
    )


def _apply(config: VllmConfig, serving: Serving, heads: HeadBounds, chosen: Freeing) -> None:
    """Gives each layer, or each unit of it, a backend whose spec says what is kept."""
    attention = config.compilation_config.static_forward_context
    local = shard(serving.masks.kv_heads)
    rank = slice(local.start, local.stop)
    layers = {name: extract_layer_index(name) for name in attention}
    base = next(iter(attention.values())).attn_backend
    freeing = _unit_backend(base, chosen.heads, chosen.bounds, config.max_in_flight_tokens)
    keeping = _unit_backend(base, chosen.heads, None, 0)
    count = (rank.stop - rank.start) // chosen.heads
    backends = {
        name: [freeing if unit < chosen.units[index] else keeping for unit in range(count)]
        for name, index in layers.items()
    }
    for name in layers:
        attention[name].attn_backend = backends[name][0]
    if count > 1:
        order = {name: freed_first(heads, index, rank) for name, index in layers.items()}
        split_layers(attention, chosen.heads, order, backends, chosen.grouping.groups)


def _unit_backend(base: Any, heads: int, bounds: Bounds | None, in_flight: int) -> Any:
    """A backend like `base` for caches of `heads` KV heads that keep what `bounds` tells."""

    class UnitBackend(base):
        @classmethod
        def customize_spec(cls, spec: Any) -> Any:
            spec = replace(super().customize_spec(spec), num_kv_heads=heads)
            if bounds is None:
                return spec
            assert spec.block_size == bounds.page, "pages changed after their bounds were taken"
            return replace_as(
                spec,
                BoundedAttentionSpec,
                drop=FULL_ONLY,
                bounds=bounds,
                in_flight_tokens=in_flight,
            )

    return UnitBackend
