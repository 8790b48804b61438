"""The backend on CPU: virtual pages over vLLM's own paged kernel.

Follows vllm/v1/attention/backends/cpu_attn.py (vLLM 0.32): cache layout, kernels, instruction
sets and KV dtypes are its own; what differs is which pages the kernel is told to read.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from dam_vllm.attention.plan import build_plan, cut_tiles
from dam_vllm.attention.select import PageSelector
from dam_vllm.config import OptionError
from dam_vllm.engine.admission import admit
from dam_vllm.engine.counters import COUNTS
from dam_vllm.engine.dynamic import DynamicStep, LayerDynamic, layer_dynamic
from dam_vllm.engine.heads import Shard, shard
from dam_vllm.engine.naive import FP8_DTYPES, NaiveBatch, serve_naive
from dam_vllm.engine.report import log_masks
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

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        if current_platform.is_cpu():
            return None
        return f"DAM serves on CPU only, not on {current_platform.device_name}"


@dataclass
class DamCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata for layers that read everything, and ours for the others.

    Attributes:
        virtual: static and dense heads by layer name, None for a layer without; empty where the
            whole step reads every page.
        dynamic: what dynamic heads need, where `virtual` is not empty.
        naive: by layer name, with `kernel: naive`.
    """

    virtual: dict[str, VirtualBatch | None] | None = None
    dynamic: DynamicStep | None = None
    naive: dict[str, NaiveBatch] | None = None


class DamCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds the plan of a step for the layers of one KV-cache group."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.serving = admit(vllm_config)
        self.masked = self._masked_layers(layer_names)
        self.all_masked = len(self.masked) == len(layer_names)
        self.static: dict[str, list[int]] = {}
        self.selector: PageSelector | None = None
        dynamic = (self.serving.masks.modes == HeadMode.DYNAMIC).any()
        if dynamic or self.serving.options.kernel == "naive":
            self._read_plain_layout(layer_names)
        self.scheduler = Scheduler(
            group=self.num_heads // self.num_kv_heads,
            head_size=self.head_dim,
            dtype=self.dtype,
            isa=self.isa,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        if self.masked:
            masks, options = self.serving.masks, self.serving.options
            local = shard(masks.kv_heads)
            tables = [local.tables(masks, layer, self.block_size) for layer in self.masked.values()]
            self.selector = PageSelector(tables, options.dense_below)
            self._set_up_dynamic(local, self.selector)
            if get_tensor_model_parallel_rank() == 0:
                log_masks(self.serving, self.block_size, vllm_config.model_config.max_model_len)

    def _masked_layers(self, layer_names: list[str]) -> dict[str, int]:
        """Global indices of this group's layers that the masks hold; the rest is vLLM's."""
        layers = self.vllm_config.compilation_config.static_forward_context
        types = self.serving.masks.header.layer_types
        result = {}
        for name in layer_names:
            index = extract_layer_index(name)
            windowed = layers[name].impl.sliding_window != -1
            if index < len(types) and types[index] == "full" and not windowed:
                result[name] = index
        return result

    def _set_up_dynamic(self, local: Shard, selector: PageSelector) -> None:
        """Hands dynamic heads to their layers' implementations; keeps the other heads' ids."""
        layers = self.vllm_config.compilation_config.static_forward_context
        for name, index in self.masked.items():
            attention = layers[name]
            impl = attention.impl
            impl.dynamic = layer_dynamic(
                self.serving.masks,
                index,
                local,
                page=self.block_size,
                dense_below=selector.dense_tiles * selector.tile,
                scale=impl.scale * (attention._k_scale_float if impl.is_fp8_kv_cache else 1.0),
                softcap=impl.logits_soft_cap,
                stored=FP8_DTYPES.get(self.kv_cache_dtype),
                scheduler=self.scheduler,
            )
            dynamic = local.dynamic_heads(self.serving.masks, index)
            self.static[name] = [head for head in range(selector.heads) if head not in dynamic]

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
        selector = self.selector
        if selector is not None and self.serving.options.kernel == "naive":
            return self._build_naive(common_prefix_len, common, fast_build)
        dense_until = 0 if selector is None else selector.dense_tiles * selector.tile
        if selector is None or int(common.seq_lens.max()) <= dense_until:
            if selector is not None and common.max_query_len > 1:
                self._count_dense(selector, common)
            return self._stock(common_prefix_len, common, fast_build)
        virtual, dynamic = self._virtual(selector, common), self._dynamic(common)
        if not self.all_masked:
            metadata = self._stock(common_prefix_len, common, fast_build)
            metadata.virtual, metadata.dynamic = virtual, dynamic
            return metadata
        return DamCPUMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            virtual=virtual,
            dynamic=dynamic,
        )

    def _stock(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool
    ) -> DamCPUMetadata:
        stock = super().build(common_prefix_len, common, fast_build)
        return DamCPUMetadata(**vars(stock))

    def _virtual(
        self, selector: PageSelector, common: CommonAttentionMetadata
    ) -> dict[str, VirtualBatch | None]:
        """Virtual sequences of the heads that need no queries to choose their pages."""
        tiles = cut_tiles(common.query_start_loc, common.seq_lens, selector.tile)
        plan = build_plan(selector, tiles, common.block_table_tensor)
        result: dict[str, VirtualBatch | None] = {}
        for row, name in enumerate(self.masked):
            heads = self.static[name]
            result[name] = self.scheduler.static(plan, row, selector.heads, heads)
            if common.max_query_len > 1:
                pages = (plan.seq_lens[row] + selector.page - 1) // selector.page
                new = common.query_start_loc.diff()
                COUNTS.add(pages.view(selector.heads, -1)[heads], tiles, new, selector.page)
        return result

    @staticmethod
    def _count_dense(selector: PageSelector, common: CommonAttentionMetadata) -> None:
        tiles = cut_tiles(common.query_start_loc, common.seq_lens, selector.tile)
        causal = (tiles.stop - 1) // selector.page + 1
        pages = causal.expand(selector.layers, selector.heads, -1)
        COUNTS.add(pages, tiles, common.query_start_loc.diff(), selector.page)

    def _dynamic(self, common: CommonAttentionMetadata) -> DynamicStep:
        tiles = cut_tiles(common.query_start_loc, common.seq_lens, self.block_size)
        return DynamicStep(tiles, common.query_start_loc.diff(), common.block_table_tensor)

    def _build_naive(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool
    ) -> DamCPUMetadata:
        metadata = self._stock(common_prefix_len, common, fast_build)
        metadata.naive = {
            name: NaiveBatch(self.serving, layer, shard(self.serving.masks.kv_heads))
            for name, layer in self.masked.items()
        }
        return metadata


class DamCPUImpl(CPUAttentionBackendImpl):
    """Runs vLLM's kernel on virtual pages, or as it stands where every page is read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refused = {
            "ALiBi": self.alibi_slopes is not None,
            "attention sinks (learned per head)": self.sinks is not None,
            f"attention of type {self.attn_type!r}": self.attn_type != AttentionType.DECODER,
        }
        for feature, present in refused.items():
            if present:
                raise OptionError(
                    f"--attention-backend dam: this model has {feature}, which DAM does not "
                    f"serve; leave the option away"
                )
        admit(get_current_vllm_config())
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
            key = self.dynamic.rotated_keys(key)
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
                query = self.dynamic.rotated_queries(query, self.num_kv_heads)
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
        """Reads the selected pages; shapes as in vLLM's `forward`, queries rotated."""
        tokens, (heads, size) = metadata.num_actual_tokens, query.shape[1:]
        shape = (tokens, self.num_kv_heads, heads // self.num_kv_heads, size)
        asked, result = query[:tokens].view(shape), output[:tokens].view(shape)
        assert metadata.virtual is not None
        batches = [metadata.virtual[layer.layer_name]]
        if self.dynamic is not None:
            assert metadata.dynamic is not None
            batches.append(self.dynamic.virtual(asked, kv_cache, metadata.dynamic))
        for batch in batches:
            if batch is not None:
                attend(self, layer, asked, kv_cache, batch, result)
