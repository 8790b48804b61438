"""The backend on CUDA: FlashAttention or Triton on virtual pages, planned on the device.

Follows vllm/v1/attention/backends/flash_attn.py (vLLM 0.32). Layers without masks and steps that
read everything are FlashAttention's own. A step's metadata tells only where queries lie, from
lengths that the host knows and tensors that vLLM keeps for CUDA graphs; each layer plans on the
device when it runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import KVCacheLayout

from dam_vllm.attention.cuda.layer import Part
from dam_vllm.attention.cuda.plan import DeviceQueryBlocks, query_block_slots
from dam_vllm.engine.backend import DamImpl
from dam_vllm.engine.checks import admit
from dam_vllm.engine.counters import COUNTS, counting
from dam_vllm.engine.device_heads import LayerHeads, layer_heads
from dam_vllm.engine.naive import NaiveBatch, serve_naive
from dam_vllm.engine.report import log_masks
from dam_vllm.engine.shards import masked_layers, shard
from dam_vllm.options import OptionError


class DamCUDABackend(FlashAttentionBackend):
    """The backend that `--attention-backend dam` chooses."""

    @staticmethod
    def get_name() -> str:
        return "DAM"

    @staticmethod
    def get_impl_cls() -> type["DamCUDAImpl"]:
        return DamCUDAImpl

    @staticmethod
    def get_builder_cls() -> type["DamCUDAMetadataBuilder"]:
        return DamCUDAMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Heads before tokens, so that a head's part of a page is a page of its own."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= 256 and super().supports_head_size(head_size)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        if not current_platform.is_cuda():
            return f"DAM serves on CPU and CUDA, not on {current_platform.device_name}"
        return super().supports_combination(*args, **kwargs)


@dataclass
class DamCUDAMetadata(FlashAttentionMetadata):
    """FlashAttention's metadata, and where the queries of sparse layers lie.

    Attributes:
        parts: requests with one query, then those with more; empty where every layer reads
            everything.
        naive: by layer name, with `kernel: naive`.
    """

    parts: tuple[Part, ...] = ()
    naive: dict[str, NaiveBatch] | None = None


def _refuse_whole_layers(names: list[str], masked: Mapping[str, int], attention: Any) -> None:
    """Refuses layers without masks or window beside a quantised cache: their queries are not."""
    for name in names:
        if name not in masked and not attention[name].impl.windowed:
            raise OptionError(
                f"--kv-cache-dtype is fp8: on CUDA --attention-backend dam serves it for layers "
                f"with masks or a sliding window, which {name} has not; use a 16-bit cache"
            )


class DamCUDAMetadataBuilder(FlashAttentionMetadataBuilder):
    """Tells layers of one KV-cache group where a step's queries lie."""

    # Decoding's shapes depend on the number of requests alone; a prefill's on its queries.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    # Layers of another group may need query blocks of another size.
    supports_update_block_table = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.serving = admit(vllm_config)
        attention = vllm_config.compilation_config.static_forward_context
        self.masked = masked_layers(layer_names, attention, self.serving)
        if self.masked and kv_cache_spec.page_size_padded is not None:
            raise OptionError(
                "--attention-backend dam: this model's KV pages are padded to the size of other "
                "layers' state, which DAM does not serve on CUDA; leave the option away"
            )
        self.counting = counting(vllm_config)
        self.all_masked = len(self.masked) == len(layer_names)
        # Queries of masked layers come unquantised, which FlashAttention does not take.
        self.always = is_quantized_kv_cache(vllm_config.cache_config.cache_dtype)
        if self.always:
            _refuse_whole_layers(layer_names, self.masked, attention)
        query_blocks, self.dense_until = set(), 0
        for name, index in self.masked.items():
            impl = attention[name].impl
            impl.heads = layer_heads(self.serving, index, attention[name], self.block_size, device)
            query_blocks |= {each.selector.query_block for each in impl.heads.layer.sets}
            self.dense_until = impl.heads.dense_until
        self.query_blocks = sorted(query_blocks)
        most = max(vllm_config.scheduler_config.max_num_seqs, self.max_cudagraph_size or 0)
        self.first = torch.zeros(most, dtype=torch.int32, device=device)
        self.each = torch.arange(most, dtype=torch.int32, device=device)
        if self.masked:
            log_masks(self.serving, self.block_size, vllm_config.model_config.max_model_len)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: Any
    ) -> AttentionCGSupport:
        if admit(vllm_config).options.kernel == "naive":
            return AttentionCGSupport.NEVER
        return cls._cudagraph_support

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DamCUDAMetadata:
        common, naive = common_attn_metadata, self.serving.options.kernel == "naive"
        sparse = bool(self.masked) and (self.always or common.max_seq_len > self.dense_until)
        # Without a layer that takes it, FlashAttention's schedule is not worth its launch.
        unscheduled = sparse and self.all_masked
        stock = super().build(common_prefix_len, common, fast_build or unscheduled)
        metadata = DamCUDAMetadata(**vars(stock))
        if naive:
            local = shard(self.serving.masks.kv_heads)
            metadata.naive = {
                name: NaiveBatch(self.serving, index, local) for name, index in self.masked.items()
            }
        elif sparse:
            metadata.parts = self._parts(common)
        elif self.counting and self.masked and common.max_query_len > 1:
            self._count_dense(common)
        return metadata

    def _count_dense(self, common: CommonAttentionMetadata) -> None:
        heads = len(self.masked) * self.num_heads_kv
        query_block, lens = max(self.query_blocks), common.seq_lens.cpu()
        COUNTS.add_dense(common.query_start_loc_cpu, lens, query_block, self.block_size, heads)

    def _parts(self, common: CommonAttentionMetadata) -> tuple[Part, ...]:
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(common, 1)
        width = min(cdiv(common.max_seq_len, self.block_size), common.block_table_tensor.shape[1])
        parts = []
        if decodes:
            lens = (common.query_start_loc[: decodes + 1], common.seq_lens[:decodes])
            slots = (self.each[:decodes], self.first[:decodes])
            query_blocks = {
                query_block: DeviceQueryBlocks(*slots, *lens, query_block, 1)
                for query_block in self.query_blocks
            }
            table = common.block_table_tensor[:decodes]
            parts.append(Part(query_blocks, table, slice(0, decodes), width))
        if prefills:
            lens = (common.query_start_loc[decodes:] - decode_tokens, common.seq_lens[decodes:])
            queries = np.diff(common.query_start_loc_cpu.numpy()[decodes:])
            query_blocks = {}
            for query_block in self.query_blocks:
                request, offset = self._move(query_block_slots(queries, query_block))
                most = min(query_block, int(queries.max()))
                query_blocks[query_block] = DeviceQueryBlocks(
                    request, offset, *lens, query_block, most
                )
            rows = slice(decode_tokens, common.num_actual_tokens)
            parts.append(Part(query_blocks, common.block_table_tensor[decodes:], rows, width))
        return tuple(parts)

    def _move(self, slots: np.ndarray) -> torch.Tensor:
        """To the device, without waiting for it."""
        host = torch.from_numpy(slots)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)


class DamCUDAImpl(DamImpl, FlashAttentionImpl):
    """Runs a layer's own kernel over its pages, or FlashAttention where every page is read."""

    keys_by_channel = False
    can_return_lse_for_decode = False
    supports_dcp = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heads: LayerHeads | None = None
        self.quantised = is_quantized_kv_cache(self.kv_cache_dtype)
        if self.quantised and not self.windowed:
            self.supports_quant_query_input = False

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.heads is not None and self.heads.rotation is not None:
            key = self.heads.rotation.keys(key)
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DamCUDAMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is not None and self.heads is not None:
            if self.heads.rotation is not None:
                query = self.heads.rotation.queries(query, self.num_kv_heads)
            if attn_metadata.naive:
                serve_naive(self, layer, query, kv_cache, attn_metadata, output)
                return output
            if attn_metadata.parts:
                cache = kv_cache.view(current_platform.fp8_dtype()) if self.quantised else kv_cache
                for part in attn_metadata.parts:
                    self.heads.layer.attend(query, cache, output.view(query.shape), part)
                return output
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output,
            output_scale, output_block_scale,
        )  # fmt: skip
