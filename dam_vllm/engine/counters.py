"""What workers and scheduler counted, for whoever asks the engine: `EngineCore.dam_counts`.

vLLM's endpoint plugins reach the engine by methods that a general plugin adds to it
(vllm/plugins/endpoint_plugins/interface.py).
"""

from typing import Any

from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.worker_base import WorkerBase

from dam_vllm.attention.page_counts import PageCounts
from dam_vllm.masks.page_tables import dense_until

METHOD = "dam_counts"


def add_methods() -> None:
    """Adds `dam_counts` to engine and workers; idempotent."""
    setattr(EngineCore, METHOD, engine_counts)
    setattr(WorkerBase, METHOD, worker_counts)


def worker_counts(worker: WorkerBase) -> dict[str, Any] | None:
    """What a worker counted.

    Args:
        worker: vLLM's.

    Returns:
        See `PageCounts.report`, with "page" and "dense_until" in tokens; None where no layer has
        masks.
    """
    from dam_vllm.engine.checks import admit

    vllm_config = worker.vllm_config
    layers = vllm_config.compilation_config.static_forward_context.values()
    impls = (getattr(layer, "impl", None) for layer in layers)
    counts = (getattr(impl, "counts", None) for impl in impls)
    found = next((each for each in counts if isinstance(each, PageCounts) and each.layers), None)
    if found is None:
        return None
    page = vllm_config.cache_config.block_size
    until = dense_until(admit(vllm_config).dense_below, page)
    return found.report() | {"page": page, "dense_until": until}


def engine_counts(engine: EngineCore) -> dict[str, Any]:
    """What an engine's workers and its scheduler counted.

    Args:
        engine: vLLM's.

    Returns:
        "workers", `worker_counts` of each that has some; "freed_pages", given back to vLLM while
        their requests ran.
    """
    from dam_vllm.engine.kv_free.spec import BoundedAttentionManager

    reports = engine.model_executor.collective_rpc(METHOD)
    return {
        "workers": [report for report in reports if report is not None],
        "freed_pages": BoundedAttentionManager.freed_pages,
    }
