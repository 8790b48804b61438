"""The backend on CUDA: FlashAttention or Triton on virtual pages, planned on the device.

Follows vllm/v1/attention/backends/flash_attn.py (vLLM 0.32). Layers without masks and steps that
read everything are FlashAttention's own.
"""

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from dam_vllm.attention.cuda.counts import DeviceCounts
from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.rotation import DeviceRotation, quantise
from dam_vllm.attention.cuda.scratch import Scratch
from dam_vllm.attention.cuda.store import HeadStore
from dam_vllm.attention.layout import FP8_DTYPES, KVLayout
from dam_vllm.engine.backend import DamImpl
from dam_vllm.engine.checks import admit
from dam_vllm.engine.cuda_builder import DamCUDAMetadataBuilder
from dam_vllm.engine.cuda_layers import takes_flash, worker_scratch
from dam_vllm.engine.private import scale_tensors
from dam_vllm.masks.mask_set import HeadMode

# Tokens a page unless --block-size says otherwise.
PAGE = 128


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
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """FlashAttention 3 loads whole blocks of keys at once where a page holds them."""
        return max(PAGE, super().get_preferred_block_size(default_block_size))

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


class DamCUDAImpl(DamImpl, FlashAttentionImpl):
    """Runs a step's plan, or FlashAttention where every page is read.

    FlashAttention takes quantised queries beside an fp8 cache. vLLM quantises them where no mask is
    dynamic; queries of dynamic heads are rotated first, so that then all are quantised here.

    Attributes:
        quantised: whether the cache is fp8.
        flash: whether FlashAttention serves this layer's masks.
        unquantised: whether queries come, and stay, unquantised beside an fp8 cache.
        quantises: whether queries are quantised here.
        rotates_later: whether plans rotate queries, by copies that they make anyway.
        scratch: the worker's, held by its first layer.
        layout: of the cache.
    """

    rotations = DeviceRotation
    counting = DeviceCounts
    can_return_lse_for_decode = False
    supports_dcp = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        serving = admit(self.config)
        self.quantised = self.kv_cache_dtype in FP8_DTYPES
        self.flash = takes_flash(self, serving.options)
        ours = self.quantised and not self.windowed
        self.unquantised = ours and not self.flash
        dynamic = bool((serving.masks.modes == HeadMode.DYNAMIC).any())
        self.quantises = ours and self.flash and dynamic
        self.rotates_later = serving.options.kernel != "naive" and not self.quantises
        if self.unquantised or self.quantises:
            # vLLM asks when it builds the layer.
            self.supports_quant_query_input = False
        self.scratch: Scratch | None = None
        self.layout = KVLayout(False, FP8_DTYPES.get(self.kv_cache_dtype))
        self._store: HeadStore | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.quantises:
            # From here on FlashAttention asks.
            self.supports_quant_query_input = True
        # While weights are loaded, what is allocated counts as theirs.
        worker_scratch(self.config, torch.device(current_platform.device_type))

    def prepared(self, layer: Any, query: torch.Tensor, planned: bool) -> torch.Tensor:
        """Queries as attention takes them: quantised, rotated where a plan does not do it."""
        if not self.quantises:
            return query if planned and self.rotates_later else self.rotated(query)
        scale, _, _ = scale_tensors(layer)
        if isinstance(self.rotation, DeviceRotation):
            return self.rotation.queries(query, self.num_kv_heads, scale)
        return quantise(query, scale)

    def turned(self, key: torch.Tensor) -> torch.Tensor:
        """As they are: the launch that stores keys turns them."""
        return key

    def storing(self, layer: Any) -> HeadStore | None:
        """What stores keys and values of a layer with dynamic heads, made once.

        None where vLLM does, or the groups that hold the layer's KV heads.
        """
        if self.groups is not None or not isinstance(self.rotation, DeviceRotation):
            return None
        if self._store is None:
            heads = torch.arange(
                self.num_kv_heads, dtype=torch.int32, device=self.rotation.heads.device
            )
            _, *scales = scale_tensors(layer)
            homes = Homes.of_heads(heads, self.num_kv_heads)
            self._store = HeadStore(homes, (scales[0], scales[1]), self.rotation)
        return self._store

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        store = self.storing(layer)
        if store is not None:
            store.write(key, value, *self.layout.keys_and_values(kv_cache), slot_mapping)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
