"""What the backends of all platforms share: layers' set-up, a step for planning, and running."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata

from dam_vllm.attention.chosen_pages import ChosenPages
from dam_vllm.attention.interface import SparseAttention, Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.page_counts import PageCounts
from dam_vllm.attention.rotation import HeadRotation
from dam_vllm.engine.checks import admit
from dam_vllm.engine.kv_free.apply import free_kv_heads
from dam_vllm.engine.private import cache_scales
from dam_vllm.engine.serving import Serving
from dam_vllm.engine.shards import full_layers, masked_layers, shard
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.options import OptionError

NO_WINDOW = (-1, (-1, -1))


def guessed_tokens(config: VllmConfig, serving: Serving) -> int:
    """Tokens that a step may guess and verify of a request, where that matters to any head.

    A static head reads the same pages for a query whatever others are in the step.
    """
    speculative = config.speculative_config
    if speculative is None or not (serving.masks.modes == HeadMode.DYNAMIC).any():
        return 0
    return int(speculative.num_speculative_tokens)


def step_of(common: CommonAttentionMetadata, guessed: int) -> Step:
    """What planning needs of vLLM's metadata.

    Args:
        common: vLLM's.
        guessed: see `guessed_tokens`; queries that verify guesses are planned one by one, so that
            what they choose does not depend on guesses after them.
    """
    step = Step(
        query_start_loc=common.query_start_loc,
        query_start_loc_cpu=common.query_start_loc_cpu,
        seq_lens=common.seq_lens,
        block_table=common.block_table_tensor,
        tokens=common.num_actual_tokens,
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
        seq_lens_cpu=common.seq_lens_cpu_upper_bound,
    )
    if not guessed or common.is_prefilling is None:
        return step
    queries = step.query_start_loc_cpu.diff()
    verifying = (queries > 1) & (queries <= 1 + guessed)
    # Padding requests, which have no queries, may be missing there.
    verifying[: len(common.is_prefilling)] &= ~common.is_prefilling
    return step.one_by_one(verifying)


def chosen_pages(serving: Serving, impl: Any, page: int) -> ChosenPages[Any]:
    """What keeps the worker's chosen pages, for layers with pages of `page` tokens.

    Args:
        serving: what is served.
        impl: of one of the layers.
        page: tokens a page.

    Raises:
        OptionError: if heads reuse pages and other layers' are of another size.
    """
    chosen: ChosenPages[Any] = impl.chosen
    if chosen.last and chosen.page not in (None, page):
        raise OptionError(
            f"mask file {serving.file} has heads that reuse pages which others choose, and the KV "
            f"pages of this model's layers have {chosen.page} and {page} tokens; serve all layers "
            f"with one cache dtype (leave --kv-cache-dtype-skip-layers away)"
        )
    chosen.page = page
    return chosen


def oracle_attention(
    serving: Serving,
    layers: Mapping[str, int],
    attention: Mapping[str, Any],
    layout: KVLayout,
    page: int,
) -> SparseAttention:
    """What serves layers with `kernel: naive`.

    Args:
        serving: options and masks.
        layers: global indices by name.
        attention: vLLM's attention layers by name.
        layout: of their caches.
        page: tokens a page.
    """
    # The oracle is no part of what serves otherwise.
    from dam_vllm.attention.oracle_attention import OracleAttention, OracleLayer

    masks, options = serving.masks, serving.options
    served = {}
    for name, index in layers.items():
        impl, (key_scale, value_scale) = attention[name].impl, cache_scales(attention[name])
        served[name] = OracleLayer(
            index, impl.scale, impl.logits_soft_cap or 0.0, key_scale, value_scale
        )
    exact, local = options.granularity == "token", shard(masks.kv_heads)
    chosen = chosen_pages(serving, attention[next(iter(layers))].impl, page)
    return OracleAttention(served, masks, local, layout, exact, serving.dense_below, chosen)


def set_up_layers(config: VllmConfig) -> None:
    """Prepares all attention layers of a worker, once their weights are loaded.

    Keys of dynamic heads are stored rotated into the calibrated basis, so that the leading channels
    of the cached keys are the keys that score a page: there is no second cache, and pages found by
    prefix caching carry theirs along. Queries of these heads are rotated alike, on every path. What
    these heads chose is kept in one place of the worker, for heads of any layer that reuse it.

    Args:
        config: vLLM's configuration, all layers built.

    Raises:
        OptionError: if a layer with masks was left to another backend.
    """
    serving, attention = admit(config), config.compilation_config.static_forward_context
    local, device = shard(serving.masks.kv_heads), torch.device(current_platform.device_type)
    chosen: ChosenPages[Any] = ChosenPages.of_masks(serving.masks, local)
    ours = _own_layers(attention, serving)
    masked = masked_layers(ours, attention, serving)
    counting = attention[ours[0]].impl.counting
    counts = counting(sorted(masked.values()), local.heads, local.start, device)
    for name, index in masked.items():
        impl = attention[name].impl
        impl.counts = counts
        impl.rotation = impl.rotations.of_layer(serving.masks, index, local, device)
        impl.chosen = chosen
    free_kv_heads(config)


def _own_layers(attention: Mapping[str, Any], serving: Serving) -> list[str]:
    """Layers that this backend was chosen for; all that have masks must be."""
    impls = {name: layer.impl for name, layer in attention.items() if hasattr(layer, "impl")}
    ours = [name for name, impl in impls.items() if isinstance(impl, DamImpl)]
    for name in full_layers([name for name in impls if name not in ours], serving):
        raise OptionError(
            f"--attention-config: backend_per_kind leaves {name} to {type(impls[name]).__name__}: "
            f"mask file {serving.file} has masks for it, so that full_attention must be DAM"
        )
    return ours


class DamImpl:
    """Goes before vLLM's implementation of a platform among the bases of ours.

    Attributes:
        rotations: how the platform rotates.
        counting: how it counts.
        config: vLLM's configuration.
        rotation: of the layer's dynamic heads, or None.
        chosen: the worker's; what dynamic heads chose, for those that reuse it.
        counts: the worker's, of what masked layers read; of nothing in other layers.
        groups: holds the layer where its KV heads lie in several of vLLM's cache groups
            (`dam_vllm.engine.kv_free.head_groups`), else None.
    """

    rotations: type[HeadRotation] = HeadRotation
    counting: type[PageCounts] = PageCounts

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        this: Any = self
        refused = {
            "ALiBi": this.alibi_slopes is not None,
            "attention sinks (learned per head)": this.sinks is not None,
            f"attention of type {this.attn_type!r}": this.attn_type != AttentionType.DECODER,
        }
        for feature, present in refused.items():
            if present:
                raise OptionError(
                    f"--attention-backend dam: this model has {feature}, which DAM does not "
                    f"serve; leave the option away"
                )
        self.config = get_current_vllm_config()
        serving, shared = admit(self.config), this.kv_sharing_target_layer_name
        if shared is not None and (serving.masks.modes == HeadMode.DYNAMIC).any():
            raise OptionError(
                f"mask file {serving.file} has dynamic heads, whose keys are stored rotated, and "
                f"this model has layers that read the keys of another, {shared}; serve masks "
                f"without dynamic heads"
            )
        self.rotation: HeadRotation | None = None
        self.chosen: ChosenPages[Any] = ChosenPages()
        self.counts = PageCounts((), 0, 0, torch.device("cpu"))
        self.groups: Any = None
        self.loaded = False

    @property
    def windowed(self) -> bool:
        """Whether this layer has a sliding window, which is left to vLLM."""
        return getattr(self, "sliding_window") not in NO_WINDOW  # noqa: B009 (the base's)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        layers = self.config.compilation_config.static_forward_context.values()
        impls = (getattr(layer, "impl", None) for layer in layers)
        # The layer that comes first acts for all, and only once: weights may be loaded again.
        if not any(impl.loaded for impl in impls if isinstance(impl, DamImpl)):
            set_up_layers(self.config)
        self.loaded = True

    def prepared(self, layer: Any, query: torch.Tensor, planned: bool) -> torch.Tensor:
        """Queries as attention takes them, by a plan or by vLLM's own path."""
        return self.rotated(query)

    def rotated(self, query: torch.Tensor) -> torch.Tensor:
        """Queries with those of dynamic heads rotated."""
        if self.rotation is None:
            return query
        this: Any = self
        return self.rotation.queries(query, this.num_kv_heads)

    def turned(self, key: torch.Tensor) -> torch.Tensor:
        """Keys as what stores them takes them: those of dynamic heads rotated."""
        return key if self.rotation is None else self.rotation.keys(key)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        key = self.turned(key)
        if self.groups is not None:
            self.groups.store(layer, key, value, slot_mapping)
            return
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if attn_metadata is not None:
            planned = attn_metadata.planned
            covered = planned is not None and planned.covers(layer.layer_name)
            query = self.prepared(layer, query, covered)
            if covered:
                planned.run(layer.layer_name, query, kv_cache, output.view(query.shape))
                return output
        return super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
