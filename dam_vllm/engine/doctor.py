"""What vLLM says here, for `dam-vllm doctor`: a child that ends with one line of JSON."""

import json
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from dam_vllm.attention.interface import SparseAttention
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.self_check import HEADS, KV_HEADS, LAYER, PAGE, REQUESTS, SCALE, SIZE
from dam_vllm.attention.self_check import difference as difference_from_oracle
from dam_vllm.engine.registration import BACKENDS, NAME
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.page_tables import PageSelector, page_tables
from dam_vllm.masks.sharding import Shard
from dam_vllm.options import PAGE_MULTIPLES

CAPABILITY = (8, 0)
# Largest difference from the oracle: float32 on CPU, float16 on CUDA.
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-3}


def examine() -> dict[str, Any]:
    """Loads plugins as vLLM does, and tries the kernels.

    Returns:
        `vllm`, its version; `platform`; `device`, its name; `chosen`, the class that
        `--attention-backend dam` gives, or None; `kernels`, by name None where one can serve, else
        why not; `error`, the largest difference from the oracle, and `tolerance`, or None where no
        kernel can serve.
    """
    load_general_plugins()
    platform = current_platform.device_name
    found = {
        "vllm": vllm.__version__,
        "platform": platform,
        "device": current_platform.get_device_name() if platform == "cuda" else platform,
        "chosen": _chosen(),
        "kernels": kernels(),
        "error": None,
        "tolerance": TOLERANCE.get(platform),
    }
    if platform == "cpu":
        found["error"] = difference_from_oracle(
            cpu_attention, KVLayout(keys_by_channel=True), torch.float32, torch.device("cpu")
        )
    elif found["kernels"].get("triton", "") is None:
        found["error"] = difference_from_oracle(
            triton_attention, KVLayout(keys_by_channel=False), torch.float16, torch.device("cuda")
        )
    return found


def kernels() -> dict[str, str | None]:
    """The values of the option `kernel`: None where one can serve here, else why not."""
    if current_platform.is_cpu():
        cuda = "serves on CUDA"
        return {"auto": None, "naive": None, "flash": cuda, "triton": cuda}
    if not current_platform.is_cuda():
        why = f"DAM serves on {' and '.join(PAGE_MULTIPLES)}, not on {current_platform.device_name}"
        return dict.fromkeys(("auto", "naive", "flash", "triton"), why)
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.attention.backends.fa_utils import is_flash_attn_varlen_func_available

    if not current_platform.has_device_capability(CAPABILITY):
        why = f"needs compute capability {'.'.join(map(str, CAPABILITY))} or later"
        return dict.fromkeys(("auto", "naive", "flash", "triton"), why)
    flash = None if is_flash_attn_varlen_func_available() else "vLLM holds no FlashAttention here"
    triton = None if HAS_TRITON else "Triton does not run here"
    return {"auto": flash and triton, "naive": None, "flash": flash, "triton": triton}


def cpu_attention(masks: MaskSet) -> SparseAttention:
    """Virtual pages over the paged kernel of vLLM, as served on CPU."""
    from dam_vllm.attention.cpu.attention import CPUAttention
    from dam_vllm.attention.cpu.kernel import CPULayer
    from dam_vllm.engine.cpu import CPUKernel

    return CPUAttention(
        served={LAYER: CPULayer(SCALE, 0.0, range(KV_HEADS))},
        selector=PageSelector([page_tables(masks, 0, PAGE)]),
        kernel=CPUKernel(HEADS // KV_HEADS, SIZE, torch.float32, "vec", "auto"),
        layout=KVLayout(keys_by_channel=True),
    )


def triton_attention(masks: MaskSet) -> SparseAttention:
    """The Triton kernel, as served on CUDA."""
    from dam_vllm.attention.cuda.attention import CUDAAttention, Limits, static_sets
    from dam_vllm.attention.cuda.layer import DeviceLayer
    from dam_vllm.attention.cuda.paged import Softmax
    from dam_vllm.attention.cuda.scratch import Scratch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, length = sum(new for _, new in REQUESTS), max(stop for stop, _ in REQUESTS)
    layer = DeviceLayer(
        static=static_sets(masks, 0, Shard(0, KV_HEADS), PAGE, 0, False, device),
        choosing=None,
        kv_heads=KV_HEADS,
        softmax=Softmax(SCALE),
        flash=None,
    )
    return CUDAAttention(
        served={LAYER: layer},
        page=PAGE,
        layout=KVLayout(keys_by_channel=False),
        limits=Limits(len(REQUESTS), tokens, length),
        scratch=Scratch(tokens, 0, torch.float16, device),
        dense_below=0,
        counts=None,
        device=device,
    )


def _chosen() -> str | None:
    """The class that vLLM takes for `--attention-backend dam`, or None where it knows no such."""
    member = AttentionBackendEnum.__members__.get(NAME)
    if member is None or not current_platform.is_cpu():
        return None if member is None else member.get_path()
    config = AttentionSelectorConfig(SIZE, torch.bfloat16, "auto", PAGE)
    chosen: str = current_platform.get_attn_backend_cls(member, config)
    return chosen if chosen == BACKENDS["cpu"] else None


if __name__ == "__main__":
    print(json.dumps(examine()))
