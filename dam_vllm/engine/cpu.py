"""The backend on CPU: virtual pages over vLLM's own paged kernel.

Follows vllm/v1/attention/backends/cpu_attn.py (vLLM 0.32): cache layout, kernels, instruction
sets and KV dtypes are its own; what differs is which pages the kernel is told to read.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from dam_vllm.engine.backend import DamImpl
from dam_vllm.engine.checks import admit
from dam_vllm.engine.dynamic import DynamicStep, LayerDynamic
from dam_vllm.engine.kv_free.head_groups import SplitLayers
from dam_vllm.engine.naive import NaiveBatch, serve_naive
from dam_vllm.engine.planner import Planner
from dam_vllm.engine.report import log_masks
from dam_vllm.engine.shards import masked_layers, shard
from dam_vllm.engine.virtual import Scheduler, VirtualBatch, attend
from dam_vllm.masks.mask_set import HeadMode


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
    """vLLM's metadata for layers that read everything, and ours for the others.

    Attributes:
        virtual: heads whose pages are known by layer name, None for a layer without; empty where
            vLLM's own path reads every page.
        dynamic: what dynamic heads need to choose pages; None where they read every page.
        naive: by layer name, with `kernel: naive`.
        slots: int64 [groups, tokens], where new tokens go in the pool of split layers, but for
            each head's offset.
    """

    virtual: dict[str, VirtualBatch | None] | None = None
    dynamic: DynamicStep | None = None
    naive: dict[str, NaiveBatch] | None = None
    slots: torch.Tensor | None = None


class DamCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds the plan of a step for the layers of one KV-cache group.

    Layers whose KV heads lie in several groups are planned together, by `SplitLayers`.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.serving = admit(vllm_config)
        dynamic = (self.serving.masks.modes == HeadMode.DYNAMIC).any()
        if dynamic or self.serving.options.kernel == "naive":
            self._read_plain_layout(layer_names)
        attention = vllm_config.compilation_config.static_forward_context
        self.split: SplitLayers | None = attention[layer_names[0]].impl.split
        self.planner: Planner | None = None
        if self.split is None:
            masked = self._masked_layers(layer_names)
            self.all_masked = len(masked) == len(layer_names)
            self.planner = self._planner(masked) if masked else None
        elif self.split.home in layer_names:
            self.split.planner = self._planner(self._masked_layers(list(self.split.units)))

    def _masked_layers(self, layer_names: list[str]) -> dict[str, int]:
        """Global indices of the layers that the masks hold; the rest is vLLM's."""
        attention = self.vllm_config.compilation_config.static_forward_context
        return masked_layers(layer_names, attention, self.serving)

    def _planner(self, layers: dict[str, int]) -> Planner:
        masks = self.serving.masks
        scheduler = Scheduler(
            group=masks.heads // masks.kv_heads,
            head_size=self.head_dim,
            dtype=self.dtype,
            isa=self.isa,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        local = shard(masks.kv_heads)
        planner = Planner(self.serving, layers, local, scheduler, self.block_size)
        planner.set_up_dynamic(self.vllm_config.compilation_config.static_forward_context)
        if get_tensor_model_parallel_rank() == 0:
            length = self.vllm_config.model_config.max_model_len
            log_masks(self.serving, self.block_size, length)
        return planner

    def _read_plain_layout(self, layer_names: list[str]) -> None:
        """Keeps keys in the plain layout that we read ourselves, also where AMX is."""
        self.isa = "vec" if self.block_size % 32 == 0 else "vec16"
        self._set_isa_to_layers(layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DamCPUMetadata:
        common = common_attn_metadata
        if self.split is not None:
            return self._geometry(common)
        planner = self.planner
        if planner is not None and self.serving.options.kernel == "naive":
            return self._build_naive(planner, common_prefix_len, common, fast_build)
        if planner is None or planner.is_dense(common):
            if planner is not None:
                planner.count_dense(common)
            return self._stock(common_prefix_len, common, fast_build)
        if self.all_masked:
            metadata = self._geometry(common)
        else:
            metadata = self._stock(common_prefix_len, common, fast_build)
        pages = -(-int(common.seq_lens.max()) // self.block_size)
        where = planner.whole_layers(common.block_table_tensor[:, :pages])
        metadata.virtual = planner.virtual(common, where)
        metadata.dynamic = planner.dynamic(common, where)
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

    def _build_naive(
        self,
        planner: Planner,
        common_prefix_len: int,
        common: CommonAttentionMetadata,
        fast_build: bool,
    ) -> DamCPUMetadata:
        metadata = self._stock(common_prefix_len, common, fast_build)
        metadata.naive = {
            name: NaiveBatch(self.serving, layer, shard(self.serving.masks.kv_heads))
            for name, layer in planner.layers.items()
        }
        return metadata


class DamCPUImpl(DamImpl, CPUAttentionBackendImpl):
    """Runs vLLM's kernel on virtual pages, or as it stands where every page is read."""

    keys_by_channel = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dynamic: LayerDynamic | None = None

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.dynamic is not None:
            key = self.dynamic.rotation.keys(key)
        if self.split is not None:
            self.split.store(self, layer, key, value)
            return
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DamCPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is not None:
            name = layer.layer_name
            if self.dynamic is not None:
                query = self.dynamic.rotation.queries(query, self.num_kv_heads)
            if self.split is not None:
                self._serve(layer, query, self.split.pool, self.split.plan(), output)
                return output
            if attn_metadata.virtual and name in attn_metadata.virtual:
                self._serve(layer, query, kv_cache, attn_metadata, output)
                return output
            if attn_metadata.naive and name in attn_metadata.naive:
                serve_naive(self, layer, query, kv_cache, attn_metadata, output)
                return output
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output,
            output_scale, output_block_scale,
        )  # fmt: skip

    def _serve(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: DamCPUMetadata,
        output: torch.Tensor,
    ) -> None:
        """Reads the selected pages.

        Args:
            layer: the attention layer.
            query: [tokens, heads, head_size], rotated where a head is dynamic.
            kv_cache: [blocks, kv_heads, page, 2 * head_size], virtual pages in order.
            metadata: the step's, planned.
            output: [tokens, heads, head_size], written.
        """
        tokens, (heads, size) = metadata.num_actual_tokens, query.shape[1:]
        shape = (tokens, self.num_kv_heads, heads // self.num_kv_heads, size)
        asked, result = query[:tokens].view(shape), output[:tokens].view(shape)
        assert metadata.virtual is not None
        batches = [metadata.virtual[layer.layer_name]]
        if self.dynamic is not None and metadata.dynamic is not None:
            batches.append(self.dynamic.virtual(asked, kv_cache, metadata.dynamic))
        for batch in batches:
            if batch is not None:
                attend(self, layer, asked, kv_cache, batch, result)
