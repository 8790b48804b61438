"""FlashAttention of the installed vLLM, as a benchmark's peer."""

from collections.abc import Callable
from typing import Any

from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata


def installed() -> tuple[Callable[..., Any], Callable[..., Any], int]:
    """Its function, what schedules it, and the version that vLLM serves with on this GPU."""
    version = get_flash_attn_version()
    assert version is not None
    return flash_attn_varlen_func, get_scheduler_metadata, version
