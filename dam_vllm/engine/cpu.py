"""The backend on CPU: virtual pages over vLLM's own paged kernel.

Follows vllm/v1/attention/backends/cpu_attn.py (vLLM 0.32): cache layout, kernels, instruction
sets and KV dtypes are its own; what differs is which pages the kernel is told to read.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
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
from dam_vllm.engine.heads import shard
from dam_vllm.engine.naive import NaiveBatch, serve_naive
from dam_vllm.engine.report import log_masks
from dam_vllm.engine.workspace import WORKSPACE


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
class VirtualBatch:
    """One layer's virtual sequences; n = KV heads x tiles.

    Attributes:
        block_table: int32 [n, width], virtual page ids.
        seq_lens: int32 [n].
        query_start_loc: int32 [n + 1].
        scheduler_metadata: how the kernel splits the work.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    scheduler_metadata: torch.Tensor


@dataclass
class DamCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata for layers that read everything, and ours for the others.

    Attributes:
        virtual: by layer name, or empty where the whole step reads every page.
        naive: by layer name, with `kernel: naive`.
    """

    virtual: dict[str, VirtualBatch] | None = None
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
        self.group = self.num_heads // self.num_kv_heads
        self.selector: PageSelector | None = None
        if self.serving.options.kernel == "naive":
            self._read_plain_layout(layer_names)
        if self.masked:
            masks, options = self.serving.masks, self.serving.options
            local = shard(masks.kv_heads)
            tables = [local.tables(masks, layer, self.block_size) for layer in self.masked.values()]
            self.selector = PageSelector(tables, options.dense_below)
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

    def _read_plain_layout(self, layer_names: list[str]) -> None:
        """Keeps keys in the plain layout that the naive kernel reads, also where AMX is."""
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
            return self._stock(common_prefix_len, common, fast_build)
        virtual = self._virtual(selector, common)
        if not self.all_masked:
            metadata = self._stock(common_prefix_len, common, fast_build)
            metadata.virtual = virtual
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
        )

    def _stock(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool
    ) -> DamCPUMetadata:
        stock = super().build(common_prefix_len, common, fast_build)
        return DamCPUMetadata(**vars(stock))

    def _virtual(
        self, selector: PageSelector, common: CommonAttentionMetadata
    ) -> dict[str, VirtualBatch]:
        tiles = cut_tiles(common.query_start_loc, common.seq_lens, selector.tile)
        plan = build_plan(selector, tiles, common.block_table_tensor)
        starts = plan.query_start_loc
        return {
            name: VirtualBatch(table, lens, starts, self._schedule(starts, lens))
            for name, table, lens in zip(self.masked, plan.block_table, plan.seq_lens, strict=True)
        }

    def _schedule(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.group,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )

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
            if attn_metadata.virtual and name in attn_metadata.virtual:
                tokens = attn_metadata.num_actual_tokens
                batch = attn_metadata.virtual[name]
                self._read_pages(layer, query[:tokens], kv_cache, batch, output[:tokens])
                return output
            if attn_metadata.naive and name in attn_metadata.naive:
                serve_naive(self, layer, query, kv_cache, attn_metadata, output)
                return output
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output,
            output_scale, output_block_scale,
        )  # fmt: skip

    def _read_pages(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: VirtualBatch,
        output: torch.Tensor,
    ) -> None:
        """Runs the kernel over virtual sequences.

        Args:
            layer: the attention layer, for its scales.
            query: [tokens, heads, head_size].
            kv_cache: [blocks, kv_heads, page, 2 * head_size].
            batch: the layer's virtual sequences.
            output: [tokens, heads, head_size], or [tokens, heads * head_size]; written.
        """
        tokens, heads, head_size = query.shape
        kv_heads = self.num_kv_heads
        grouped = (tokens, kv_heads, heads // kv_heads, head_size)
        shape = (kv_heads, tokens, *grouped[2:])
        by_head, result = WORKSPACE.take(2, shape, query.dtype)
        by_head.copy_(query.view(grouped).transpose(0, 1))
        page = kv_cache.shape[2]
        keys, values = kv_cache.view(-1, 1, 2 * page, head_size).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=by_head.flatten(0, 1),
            key_cache=keys,
            value_cache=values,
            output=result.flatten(0, 1),
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=batch.scheduler_metadata,
            s_aux=None,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        output.view(grouped).copy_(result.transpose(0, 1))
