"""Makes the backend `DAM` selectable: enum member, pickling, the CPU platform's choice, refusals.

vLLM 0.32's `register_backend` adds the member, but two gaps are left. A dynamic member does
not survive pickling into spawned processes, which unpickle the configuration before plugins
are loaded. And `CpuPlatform.get_attn_backend_cls` (platforms/cpu.py) ignores the choice.
"""

import functools
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends import registry

from dam_vllm.engine.counters import add_methods
from dam_vllm.engine.private import warn_untested
from dam_vllm.engine.refusals import OURS, refuse_early

NAME = "DAM"
# A platform is served by a backend here and an implementation of `attention.interface`.
BACKENDS = {
    "cpu": "dam_vllm.engine.cpu.DamCPUBackend",
    "cuda": "dam_vllm.engine.cuda.DamCUDABackend",
}


def member() -> registry.AttentionBackendEnum:
    """Returns the enum member, registered on first use in each process."""
    known = registry.AttentionBackendEnum.__members__.get(NAME)
    if known is not None:
        return known
    # On other platforms `admit` refuses, by name.
    platform = current_platform.device_name
    registry.register_backend(NAME, BACKENDS.get(platform, BACKENDS["cuda"]))
    added = registry.AttentionBackendEnum[NAME]
    added.__reduce_ex__ = lambda protocol: (member, ())
    return added


def register_backend() -> None:
    """Registers the backend, refuses early, lets CPUs honour it and counts be read; idempotent."""
    if NAME not in registry.AttentionBackendEnum.__members__:
        warn_untested()
    refuse_early(member())
    add_methods()
    if current_platform.is_cpu():
        _honour_choice(type(current_platform))


def _honour_choice(platform: Any) -> None:
    stock = platform.get_attn_backend_cls.__func__
    if hasattr(stock, OURS):
        return

    @functools.wraps(stock)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is not member():
            return stock(cls, selected_backend, attn_selector_config, num_heads)
        if attn_selector_config.use_mla or attn_selector_config.use_sparse:
            kind = "multi-head latent attention (MLA)"
            if attn_selector_config.use_sparse:
                kind = "sparse attention of its own"
            raise ValueError(
                f"--attention-backend dam: this model has {kind}, which DAM does not serve; "
                f"leave the option away"
            )
        return member().get_path()

    setattr(get_attn_backend_cls, OURS, True)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
