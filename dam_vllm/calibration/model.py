"""Loads a frozen model for capture."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dam_vllm.calibration import capture
from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.masks.model_shape import ModelShape, model_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is run.

    Attributes:
        name: folder or Hub id.
        revision: Hub revision, or None.
        device: where it runs.
        dtype: a key of DTYPES, or "auto": float32 on a CPU, else the model's own.
    """

    name: str
    revision: str | None
    device: torch.device
    dtype: str

    def shape(self) -> ModelShape:
        """Reads layers, heads and windows from the model's configuration.

        Raises:
            CalibrationError: if there is no such model, or it has no layer to calibrate.
        """
        try:
            shape = model_shape(AutoConfig.from_pretrained(self.name, revision=self.revision))
        except (OSError, ValueError, AttributeError) as error:
            raise CalibrationError(f"model {self.name!r} cannot be read: {error}") from error
        if "full" not in shape.layer_types:
            raise CalibrationError(
                f"model {self.name!r} has no full-attention layer: its layers are "
                f"{', '.join(sorted(set(shape.layer_types)))}, which are left to vLLM"
            )
        return shape

    def tokenizer(self) -> Any:
        """Loads the model's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(self.name, revision=self.revision)
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"model {self.name!r} has no tokenizer that can be read: {error}"
            ) from error

    def load(self) -> Any:
        """Loads the weights, safetensors only, with the capturing attention."""
        capture.register()
        auto = "float32" if self.device.type == "cpu" else "auto"
        name = auto if self.dtype == "auto" else self.dtype
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.name,
                revision=self.revision,
                dtype=DTYPES.get(name, "auto"),
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=capture.IMPLEMENTATION,
            )
        except (OSError, ValueError) as error:
            raise CalibrationError(f"model {self.name!r} cannot be loaded: {error}") from error
        return model.eval().requires_grad_(False).to(self.device)
