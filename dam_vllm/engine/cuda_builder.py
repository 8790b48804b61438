"""What the backend on CUDA knows of a step: where queries lie; what they read is planned later.

A step's metadata tells only where queries lie, from lengths that the host knows and tensors that
vLLM keeps for CUDA graphs; what is read is planned on the device, by the first of the layers that
share a plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from dam_vllm.attention.cuda.attention import CUDAAttention, Limits
from dam_vllm.attention.cuda.layer import DeviceLayer
from dam_vllm.attention.interface import Planned, SparseAttention, Step
from dam_vllm.attention.layout import FP8_DTYPES, KVLayout
from dam_vllm.engine.backend import chosen_pages, guessed_tokens, oracle_attention, step_of
from dam_vllm.engine.checks import admit
from dam_vllm.engine.cuda_layers import (
    device_layer,
    grouped,
    most_requests,
    warm_up,
    worker_scratch,
)
from dam_vllm.engine.private import single_queries_first
from dam_vllm.engine.report import log_masks
from dam_vllm.engine.shards import masked_layers
from dam_vllm.masks.page_tables import dense_until
from dam_vllm.options import OptionError


@dataclass
class DamCUDAMetadata(FlashAttentionMetadata):
    """FlashAttention's metadata, and the plan for the layers that do not read everything.

    Attributes:
        planned: serves the layers that it covers; None where every layer reads everything.
    """

    planned: Planned | None = None


def _refuse_whole_layers(names: list[str], masked: Mapping[str, int], attention: Any) -> None:
    """Refuses layers without masks or window beside a quantised cache: their queries are not."""
    for name in names:
        if name not in masked and not attention[name].impl.windowed:
            raise OptionError(
                f"--kv-cache-dtype is fp8: on CUDA --attention-backend dam serves it without "
                f"FlashAttention 3 for layers with masks or a sliding window, which {name} has "
                f"not; use a 16-bit cache"
            )


class DamCUDAMetadataBuilder(FlashAttentionMetadataBuilder):
    """Tells layers of one KV-cache group where a step's queries lie.

    Layers whose KV heads lie in several groups are planned together, by `HeadGroups`.
    """

    # Decoding's shapes depend on the number of requests alone; a prefill's on its queries.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    # Layers of another group may need query blocks of another size.
    supports_update_block_table = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        single_queries_first(self)
        self.serving = admit(vllm_config)
        self.guessed = guessed_tokens(vllm_config, self.serving)
        options = self.serving.options
        attention = vllm_config.compilation_config.static_forward_context
        self.names, self.groups = layer_names, attention[layer_names[0]].impl.groups
        own = layer_names if self.groups is None else list(self.groups.units)
        self.masked = masked_layers(own, attention, self.serving)
        if self.masked and kv_cache_spec.page_size_padded is not None:
            raise OptionError(
                "--attention-backend dam: this model's KV pages are padded to the size of other "
                "layers' state, which DAM does not serve on CUDA; leave the option away"
            )
        self.counts = attention[next(iter(self.masked), layer_names[0])].impl.counts
        self.all_masked = len(self.masked) == len(layer_names)
        cache_dtype = vllm_config.cache_config.cache_dtype
        # Queries that come unquantised FlashAttention does not take beside a quantised cache.
        unquantised = any(attention[name].impl.unquantised for name in layer_names)
        if unquantised and self.groups is None:
            _refuse_whole_layers(layer_names, self.masked, attention)
        # Plans alone write the means of spans, for the tails of later queries.
        self.always = unquantised or self.serving.masks.tails is not None
        self.dense_until = dense_until(self.serving.dense_below, self.block_size)
        layout = KVLayout(False, FP8_DTYPES.get(cache_dtype))
        self.oracle: SparseAttention | None = None
        self.sparse: CUDAAttention | None = None
        if self.masked and options.kernel == "naive":
            self.oracle = oracle_attention(
                self.serving, self.masked, attention, layout, self.block_size
            )
        elif self.masked and (self.groups is None or self.groups.home in layer_names):
            self.sparse = self._sparse(attention, layout)
        if self.groups is not None:
            config = self.vllm_config
            made = None if self.sparse is None else grouped(self.sparse, self.groups, config)
            self.groups.join(layer_names, made)
        if self.masked:
            log_masks(self.serving, self.block_size, vllm_config.model_config.max_model_len)

    def _sparse(self, attention: Mapping[str, Any], layout: KVLayout) -> CUDAAttention:
        """Sets up the layers with masks and compiles their kernels."""
        config = self.vllm_config
        scheduler, dtype = config.scheduler_config, config.model_config.dtype
        served = sorted(self.masked, key=self.masked.__getitem__)
        splits = self.max_num_splits if self.aot_schedule else 0
        scratch = worker_scratch(config, self.device)
        chosen_pages(self.serving, attention[served[0]].impl, self.block_size)

        def layer(index: int, attention: Any) -> DeviceLayer:
            return device_layer(self.serving, index, attention, self.block_size, splits, scratch)

        sparse = CUDAAttention(
            served={name: layer(self.masked[name], attention[name]) for name in served},
            page=self.block_size,
            layout=layout,
            limits=Limits(
                requests=most_requests(config),
                tokens=scheduler.max_num_batched_tokens,
                length=config.model_config.max_model_len,
            ),
            scratch=scratch,
            dense_below=self.serving.dense_below,
            counts=self.counts,
            device=self.device,
            unit=None if self.groups is None else self.groups.heads,
        )
        warm_up(sparse, [attention[name] for name in served], dtype)
        return sparse

    def _replayed(self, step: Step) -> bool:
        """Whether a CUDA graph may stand for the step, which plans and counts whatever its length.

        Where none does after all, the step is planned likewise, and reads everything it may.
        """
        requests = len(step.seq_lens)
        graphs = self.use_full_cuda_graph and step.max_query_len == 1
        return graphs and requests <= (self.max_cudagraph_size or 0)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: Any
    ) -> AttentionCGSupport:
        if admit(vllm_config).options.kernel == "naive":
            return AttentionCGSupport.NEVER
        return cls._cudagraph_support

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> DamCUDAMetadata:
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        self.counts.rehearsed = True
        return metadata

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DamCUDAMetadata:
        step = step_of(common_attn_metadata, self.guessed)
        if self.groups is not None:
            stock = super().build(common_prefix_len, common_attn_metadata, fast_build=True)
            metadata = DamCUDAMetadata(**vars(stock))
            slots = common_attn_metadata.slot_mapping
            with self.counts.planning():
                metadata.planned = self.groups.hand_in(self.names, step, slots)
            return metadata
        short = step.max_seq_len <= self.dense_until and not self._replayed(step)
        sparse = bool(self.masked) and (self.always or not short)
        # Without a layer that takes it, FlashAttention's schedule is not worth its launch.
        unscheduled = sparse and self.all_masked
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build or unscheduled)
        metadata = DamCUDAMetadata(**vars(stock))
        if self.oracle is not None:
            metadata.planned = Planned(self.oracle, self.oracle.plan(step))
        elif self.sparse is not None and sparse:
            with self.counts.planning():
                metadata.planned = Planned(self.sparse, self.sparse.plan(step))
        elif self.sparse is not None:
            self.sparse.count_dense(step)
        return metadata
