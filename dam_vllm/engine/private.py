"""What we take of vLLM that it does not promise to keep, and the releases that we hold it against.

`make compat` checks that every name we use is in those releases, private ones (with an underscore)
here and nowhere else, but for a method that `scheduler.py` overrides.
"""

import multiprocessing
from importlib import import_module
from operator import attrgetter
from typing import Any

import vllm
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.platforms import current_platform

from dam_vllm.options import OptionError

__all__ = [
    "attention_isa", "cache_scales", "give_back", "ops", "query_scale", "refuse_changed",
    "scale_tensors", "set_isa", "single_queries_first", "warn_untested",
]  # fmt: skip

TESTED = ("0.32", "0.33")
# What is looked up where a server starts, by module; the rest is taken while layers are set up.
NAMES = {
    "vllm.v1.core.single_type_kv_cache_manager": [
        "SingleTypeKVCacheManager._remove_blocks_in_range"
    ],
    "vllm.v1.attention.backend": ["AttentionMetadataBuilder._init_reorder_batch_threshold"],
    "vllm.v1.core.sched.scheduler": ["Scheduler._reserve_prefill_lookahead"],
}
CPU_NAMES = {
    "vllm.v1.attention.backends.cpu_attn": [
        "CPUAttentionMetadataBuilder._set_isa_to_layers",
        "_get_attn_isa",
    ],
}

logger = init_logger(__name__)


def warn_untested() -> None:
    """Names a release that was not tested, in one warning of the first process."""
    minor = ".".join(vllm.__version__.split(".")[:2])
    if minor not in TESTED and multiprocessing.parent_process() is None:
        logger.warning(
            "dam-vllm was tested with vLLM %s, this is %s: what fails next may come from that; "
            "install one of these, or leave --attention-backend dam away",
            " and ".join(TESTED),
            vllm.__version__,
        )


def refuse_changed() -> None:
    """Looks private names up before anything is served.

    Raises:
        OptionError: for the first that this vLLM lacks.
    """
    for module, names in (NAMES | (CPU_NAMES if current_platform.is_cpu() else {})).items():
        for name in names:
            try:
                attrgetter(name)(import_module(module))
            except (ImportError, AttributeError):
                raise OptionError(
                    f"--attention-backend dam: vLLM {vllm.__version__} has no {module}.{name}; "
                    f"install vLLM {' or '.join(TESTED)}, or leave the option away"
                ) from None


def cache_scales(layer: Any) -> tuple[float, float]:
    """Factors of a layer's stored keys and values (model_executor/layers/attention)."""
    if layer.impl.kv_cache_dtype.startswith("fp8"):
        return layer._k_scale_float, layer._v_scale_float
    return 1.0, 1.0


def query_scale(layer: Any) -> float:
    """Factor of a layer's queries where they are quantised (model_executor/layers/attention)."""
    return float(layer._q_scale_float)


def scale_tensors(layer: Any) -> tuple[Any, Any, Any]:
    """Factors of quantised queries, keys and values: one number each, float32, on the device."""
    return layer._q_scale, layer._k_scale, layer._v_scale


def single_queries_first(builder: Any) -> None:
    """Lets vLLM put requests with one query before the others (v1/attention/backend.py)."""
    builder._init_reorder_batch_threshold(1)


def set_isa(builder: Any, isa: str, layer_names: list[str]) -> None:
    """Lets vLLM's CPU kernels of some layers take other instructions, and so another layout."""
    builder.isa = isa
    builder._set_isa_to_layers(layer_names)


def give_back(manager: Any, request: str, first: int, last: int) -> None:
    """Gives a request's pages back to the pool (v1/core/single_type_kv_cache_manager.py)."""
    manager._remove_blocks_in_range(request, first, last)


def attention_isa(dtype: Any, page: int, head_size: int) -> str:
    """Instructions that vLLM's CPU kernel takes (v1/attention/backends/cpu_attn.py)."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(_get_attn_isa(dtype, page, head_size, "auto"))
