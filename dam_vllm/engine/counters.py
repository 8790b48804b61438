"""Hands the pages that prompts read to evaluations (`--worker-extension-cls`)."""

from typing import Any

from dam_vllm.attention.page_counts import COUNTS


def counting(config: Any) -> bool:
    """Whether this worker has the extension, and pages on a GPU are to be counted."""
    return str(config.parallel_config.worker_extension_cls).endswith(PageCounters.__name__)


class PageCounters:
    """Worker extension: `collective_rpc("dam_pages")`."""

    def dam_pages(self) -> dict[str, Any]:
        """Pages counted since the last call, {"read": int, "dense": int} of this worker."""
        found = {name: int(value) for name, value in vars(COUNTS).items()}
        COUNTS.read = COUNTS.dense = 0
        return found
