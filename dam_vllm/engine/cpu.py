"""The backend on CPU: virtual pages over vLLM's own paged kernel.

Follows vllm/v1/attention/backends/cpu_attn.py (vLLM 0.32): cache layout, kernels, instruction
sets and KV dtypes are its own; what differs is which pages the kernel is told to read.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from dam_vllm.attention.cpu.attention import CPUAttention
from dam_vllm.attention.cpu.kernel import CPULayer, VirtualBatch
from dam_vllm.attention.cpu.rotation import CPURotation
from dam_vllm.attention.dynamic_heads import DynamicHeads, ReusingHeads
from dam_vllm.attention.interface import Planned, SparseAttention
from dam_vllm.attention.layout import FP8_DTYPES, KVLayout
from dam_vllm.engine.backend import DamImpl, chosen_pages, guessed_tokens, oracle_attention, step_of
from dam_vllm.engine.checks import admit
from dam_vllm.engine.kv_free.cpu_groups import CPUGroups
from dam_vllm.engine.private import cache_scales, ops, set_isa
from dam_vllm.engine.report import log_masks
from dam_vllm.engine.shards import masked_layers, shard
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.page_tables import PageSelector


class DamCPUBackend(CPUAttentionBackend):
    """The backend that `--attention-backend dam` chooses."""

    @staticmethod
    def get_name() -> str:
        return "DAM"

    @staticmethod
    def get_impl_cls() -> type["DamCPUImpl"]:
        return DamCPUImpl

    @staticmethod
    def get_builder_cls() -> type["DamCPUMetadataBuilder"]:
        return DamCPUMetadataBuilder

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER


@dataclass
class DamCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata for layers that read everything, and the plan for the others.

    Attributes:
        planned: serves the layers that it covers; None where vLLM's own path reads every page.
    """

    planned: Planned | None = None


@dataclass(frozen=True)
class CPUKernel:
    """vLLM's paged kernel over virtual pages.

    Attributes:
        heads_per_kv: query heads a KV head.
        head_size: channels a head.
        dtype: of queries.
        isa: instruction set, which is also the cache's layout.
        cache_dtype: vLLM's name of the cache's dtype.
    """

    heads_per_kv: int
    head_size: int
    dtype: torch.dtype
    isa: str
    cache_dtype: str

    def schedule(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """See `PagedKernel`; it depends on nothing else."""
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.heads_per_kv,
            num_kv_heads=1,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.cache_dtype,
        )

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        batch: VirtualBatch,
        layer: CPULayer,
    ) -> None:
        """See `PagedKernel`."""
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self._raw(keys),
            value_cache=self._raw(values),
            output=output,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=layer.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.block_table,
            softcap=layer.softcap,
            scheduler_metadata=batch.schedule,
            s_aux=None,
            k_scale=layer.key_scale,
            v_scale=layer.value_scale,
            kv_cache_dtype=self.cache_dtype,
        )

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        layer: CPULayer,
    ) -> None:
        """See `PagedKernel`."""
        ops.cpu_attn_reshape_and_cache(
            key.unsqueeze(1),
            value.unsqueeze(1),
            self._raw(keys),
            self._raw(values),
            slots,
            self.isa,
            k_scale=layer.key_scale,
            v_scale=layer.value_scale,
            kv_cache_dtype=self.cache_dtype,
        )

    def _raw(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages of a cache with a single KV head; fp8 as bytes, as vLLM takes it."""
        stored = pages.view(torch.uint8) if self.cache_dtype in FP8_DTYPES else pages
        return stored.unsqueeze(1)


class DamCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Plans the steps of the layers of one KV-cache group.

    Layers whose KV heads lie in several groups are planned together, by `HeadGroups`.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.serving, self.names = admit(vllm_config), layer_names
        self.guessed = guessed_tokens(vllm_config, self.serving)
        self.naive = self.serving.options.kernel == "naive"
        masks = self.serving.masks
        if (masks.modes == HeadMode.DYNAMIC).any() or masks.tails is not None or self.naive:
            # Keys in the plain layout, which we read ourselves, also where AMX is.
            set_isa(self, "vec", layer_names)
        attention = vllm_config.compilation_config.static_forward_context
        self.layout = KVLayout(True, FP8_DTYPES.get(self.kv_cache_dtype))
        self.groups = attention[layer_names[0]].impl.groups
        own = layer_names if self.groups is None else list(self.groups.units)
        masked = masked_layers(own, attention, self.serving)
        self.counts = attention[next(iter(masked), layer_names[0])].impl.counts
        self.all_masked = len(masked) == len(layer_names)
        self.oracle: SparseAttention | None = None
        self.sparse: CPUAttention | None = None
        if masked and self.naive:
            self.oracle = oracle_attention(
                self.serving, masked, attention, self.layout, self.block_size
            )
        elif masked and (self.groups is None or self.groups.home in layer_names):
            self.sparse = self._attention(masked, attention)
        if self.groups is not None:
            self.groups.join(layer_names, None if self.sparse is None else CPUGroups(self.sparse))
        if masked:
            log_masks(self.serving, self.block_size, vllm_config.model_config.max_model_len)

    def _attention(self, layers: dict[str, int], attention: dict[str, Any]) -> CPUAttention:
        masks, page = self.serving.masks, self.block_size
        local, first = shard(masks.kv_heads), attention[next(iter(layers))].impl
        tables = [local.tables(masks, index, page) for index in layers.values()]
        served = {}
        for name, index in layers.items():
            impl, (key_scale, value_scale) = attention[name].impl, cache_scales(attention[name])
            softcap = impl.logits_soft_cap or 0.0
            dynamic = DynamicHeads.of_layer(
                masks, index, local, page, self.serving.dense_below, impl.scale * key_scale, softcap
            )
            reusing = ReusingHeads.of_layer(masks, index, local, page, self.serving.dense_below)
            chosen = [head for heads in (dynamic, reusing) if heads for head in heads.ids]
            fixed = [head for head in range(local.heads) if head not in chosen]
            served[name] = CPULayer(
                impl.scale, softcap, fixed, dynamic, key_scale, value_scale, reusing, index,
                local.tails(masks, index),
            )  # fmt: skip
        return CPUAttention(
            served=served,
            selector=PageSelector(tables, self.serving.dense_below),
            kernel=CPUKernel(
                heads_per_kv=first.num_queries_per_kv,
                head_size=self.head_dim,
                dtype=self.dtype,
                isa=self.isa,
                cache_dtype=self.kv_cache_dtype,
            ),
            layout=self.layout,
            chosen=chosen_pages(self.serving, first, page),
            counts=self.counts,
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DamCPUMetadata:
        common, step = common_attn_metadata, step_of(common_attn_metadata, self.guessed)
        if self.groups is not None:
            metadata = self._geometry(common)
            with self.counts.planning():
                metadata.planned = self.groups.hand_in(self.names, step, common.slot_mapping)
            return metadata
        if self.sparse is None or int(step.seq_lens.max()) <= self.sparse.dense_until:
            metadata = self._stock(common_prefix_len, common, fast_build)
            if self.oracle is not None:
                metadata.planned = Planned(self.oracle, self.oracle.plan(step))
            if self.sparse is not None:
                self.sparse.count_dense(step)
                if self.sparse.ends_spans(step):
                    # vLLM's own path writes no means.
                    metadata.planned = Planned(self.sparse, self.sparse.plan_dense(step))
            return metadata
        if self.all_masked:
            metadata = self._geometry(common)
        else:
            metadata = self._stock(common_prefix_len, common, fast_build)
        with self.counts.planning():
            metadata.planned = Planned(self.sparse, self.sparse.plan(step))
        return metadata

    @staticmethod
    def _geometry(common: CommonAttentionMetadata) -> DamCPUMetadata:
        """Metadata without a schedule for vLLM's own path."""
        return DamCPUMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
        )

    def _stock(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool
    ) -> DamCPUMetadata:
        stock = super().build(common_prefix_len, common, fast_build)
        return DamCPUMetadata(**vars(stock))


class DamCPUImpl(DamImpl, CPUAttentionBackendImpl):
    """Runs a step's plan, or vLLM's kernel as it stands where every page is read."""

    rotations = CPURotation
