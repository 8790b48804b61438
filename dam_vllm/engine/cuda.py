"""The backend on CUDA: FlashAttention or Triton on virtual pages, planned on the device.

Follows vllm/v1/attention/backends/flash_attn.py (vLLM 0.32). Layers without masks and steps that
read everything are FlashAttention's own. A step's metadata tells only where queries lie, from
lengths that the host knows and tensors that vLLM keeps for CUDA graphs; each layer plans on the
device when it runs.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from dam_vllm.attention.cuda.attention import CUDAAttention, head_sets
from dam_vllm.attention.cuda.flash import Varlen
from dam_vllm.attention.cuda.layer import DeviceLayer
from dam_vllm.attention.cuda.paged import Softmax
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.interface import Planned, SparseAttention
from dam_vllm.attention.layout import FP8_DTYPES, KVLayout
from dam_vllm.engine.backend import DamImpl, cache_scales, oracle_attention, step_of
from dam_vllm.engine.checks import admit
from dam_vllm.engine.counters import counting
from dam_vllm.engine.report import log_masks
from dam_vllm.engine.shards import masked_layers, shard
from dam_vllm.masks.page_tables import dense_until
from dam_vllm.options import DamOptions, OptionError


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
        options = self.serving.options
        attention = vllm_config.compilation_config.static_forward_context
        self.masked = masked_layers(layer_names, attention, self.serving)
        if self.masked and kv_cache_spec.page_size_padded is not None:
            raise OptionError(
                "--attention-backend dam: this model's KV pages are padded to the size of other "
                "layers' state, which DAM does not serve on CUDA; leave the option away"
            )
        self.counting = counting(vllm_config)
        self.all_masked = len(self.masked) == len(layer_names)
        cache_dtype = vllm_config.cache_config.cache_dtype
        # Queries of masked layers come unquantised, which FlashAttention does not take.
        self.always = cache_dtype in FP8_DTYPES
        if self.always:
            _refuse_whole_layers(layer_names, self.masked, attention)
        self.dense_until = dense_until(self.serving.dense_below, self.block_size)
        layout = KVLayout(False, FP8_DTYPES.get(cache_dtype))
        self.oracle: SparseAttention | None = None
        self.sparse: CUDAAttention | None = None
        if self.masked and options.kernel == "naive":
            self.oracle = oracle_attention(self.serving, self.masked, attention, layout)
        elif self.masked:
            layers = {
                name: self._layer(index, attention[name], layout)
                for name, index in self.masked.items()
            }
            most = max(vllm_config.scheduler_config.max_num_seqs, self.max_cudagraph_size or 0)
            self.sparse = CUDAAttention(layers, self.block_size, layout, most, self.device)
        if self.masked:
            log_masks(self.serving, self.block_size, vllm_config.model_config.max_model_len)

    def _layer(self, index: int, attention: Any, layout: KVLayout) -> DeviceLayer:
        """Sets up a layer and compiles its kernels."""
        impl, masks, options = attention.impl, self.serving.masks, self.serving.options
        local, page, below = shard(masks.kv_heads), self.block_size, self.serving.dense_below
        key_scale, value_scale = cache_scales(attention)
        softmax = Softmax(impl.scale * key_scale, impl.logits_soft_cap, value_scale)
        dynamic = DynamicHeads.of_layer(
            masks, index, local, page, below, softmax.scale, softmax.softcap, self.device
        )
        exact = options.granularity == "token"
        layer = DeviceLayer(
            sets=head_sets(masks, index, local, page, below, exact, dynamic, self.device),
            kv_heads=local.heads,
            softmax=softmax,
            varlen=_flash(impl, options),
        )
        dtype = impl.config.model_config.dtype
        dtypes = (dtype, layout.stored or dtype)
        layer.warm_up(impl.num_heads, impl.head_size, page, dtypes, layout)
        return replace(layer, counted=self.counting)

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
        step = step_of(common_attn_metadata)
        sparse = bool(self.masked) and (self.always or step.max_seq_len > self.dense_until)
        # Without a layer that takes it, FlashAttention's schedule is not worth its launch.
        unscheduled = sparse and self.all_masked
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build or unscheduled)
        metadata = DamCUDAMetadata(**vars(stock))
        if self.oracle is not None:
            metadata.planned = Planned(self.oracle, self.oracle.plan(step))
        elif self.sparse is not None and sparse:
            metadata.planned = Planned(self.sparse, self.sparse.plan(step))
        elif self.sparse is not None and self.counting:
            self.sparse.count_dense(step)
        return metadata


class DamCUDAImpl(DamImpl, FlashAttentionImpl):
    """Runs a step's plan, or FlashAttention where every page is read."""

    can_return_lse_for_decode = False
    supports_dcp = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantised = self.kv_cache_dtype in FP8_DTYPES
        if self.quantised and not self.windowed:
            self.supports_quant_query_input = False


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
