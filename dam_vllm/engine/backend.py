"""What the attention implementations of all platforms share."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType

from dam_vllm.engine.checks import admit
from dam_vllm.engine.kv_free.apply import free_kv_heads
from dam_vllm.engine.kv_free.head_groups import SplitLayers
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.options import OptionError

NO_WINDOW = (-1, (-1, -1))


class DamImpl:
    """Goes before vLLM's implementation of a platform among the bases of ours.

    Attributes:
        config: vLLM's configuration.
        split: the units that this layer is cut into, or None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        this: Any = self
        refused = {
            "ALiBi": this.alibi_slopes is not None,
            "attention sinks (learned per head)": this.sinks is not None,
            f"attention of type {this.attn_type!r}": this.attn_type != AttentionType.DECODER,
        }
        for feature, present in refused.items():
            if present:
                raise OptionError(
                    f"--attention-backend dam: this model has {feature}, which DAM does not "
                    f"serve; leave the option away"
                )
        self.config = get_current_vllm_config()
        serving, shared = admit(self.config), this.kv_sharing_target_layer_name
        if shared is not None and (serving.masks.modes == HeadMode.DYNAMIC).any():
            raise OptionError(
                f"mask file {serving.file} has dynamic heads, whose keys are stored rotated, and "
                f"this model has layers that read the keys of another, {shared}; serve masks "
                f"without dynamic heads"
            )
        self.split: SplitLayers | None = None
        self.loaded = False

    @property
    def windowed(self) -> bool:
        """Whether this layer has a sliding window, which is left to vLLM."""
        return getattr(self, "sliding_window") not in NO_WINDOW  # noqa: B009 (the base's)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        layers = self.config.compilation_config.static_forward_context.values()
        impls = (getattr(layer, "impl", None) for layer in layers)
        # The first layer acts for all, and only once: weights may be loaded again.
        if next(impl for impl in impls if isinstance(impl, DamImpl)) is self and not self.loaded:
            free_kv_heads(self.config)
        self.loaded = True
