"""Mask sets without calibration: dense, and StreamingLLM's sinks and window."""

import numpy as np
from transformers import AutoConfig

from dam_vllm.masks.fingerprint import FingerprintError, fingerprint
from dam_vllm.masks.mask_set import Header, HeadMode, MaskSet, pack_lower
from dam_vllm.masks.model_shape import model_shape
from dam_vllm.options import OptionError


def dense(model: str) -> MaskSet:
    """Every head reads every page: full attention, served by the same engine.

    Args:
        model: folder or Hub id; only its configuration is read.

    Returns:
        The mask set, for any weights of that shape.

    Raises:
        FingerprintError: if there is no such model.
    """
    return _uniform(model, "dense", np.zeros(1, bool), np.ones(1, bool), HeadMode.DENSE, {})


def streaming(model: str, sinks: int, window: int) -> MaskSet:
    """Every head reads the first `sinks` tokens and the last `window` (arXiv 2309.17453).

    Args:
        model: folder or Hub id; only its configuration is read.
        sinks: tokens kept at the start, at least 1.
        window: latest tokens kept, the query's own included, at least 1.

    Returns:
        The mask set, for any weights of that shape.

    Raises:
        OptionError: if `sinks` or `window` is below 1.
        FingerprintError: if there is no such model.
    """
    for name, value in (("--sinks", sinks), ("--window", window)):
        if value < 1:
            raise OptionError(f"{name} is {value}, must be at least 1 token")
    index = np.arange(max(sinks, window))
    parameters = {"sinks": sinks, "window": window}
    return _uniform(model, "streaming", index < sinks, index < window, HeadMode.STATIC, parameters)


def _uniform(
    model: str,
    kind: str,
    columns: np.ndarray,
    diagonals: np.ndarray,
    mode: HeadMode,
    parameters: dict[str, int],
) -> MaskSet:
    identity = fingerprint(model, weights=False)
    try:
        shape = model_shape(AutoConfig.from_pretrained(model))
    except OSError as error:
        raise FingerprintError(f"model {model!r} has no readable config.json") from error
    full = np.array([kind == "full" for kind in shape.layer_types])[:, None, None]
    every = (len(shape.layer_types), shape.heads, 1)
    return MaskSet(
        columns=np.tile(columns, every) & full,
        diagonals=np.tile(diagonals, every) & full,
        true_bits=np.tile(pack_lower(np.ones((1, 1), bool)), every) * full.astype(np.uint8),
        modes=np.full((every[0], shape.kv_heads), mode, dtype=np.uint8),
        header=Header.model_validate(
            {
                "kind": kind,
                "model": model,
                "fingerprint": identity,
                "layer_types": shape.layer_types,
                # From the second query on columns and diagonals say everything.
                "pcl": 1,
                "reach": len(columns),
                "parameters": parameters,
            }
        ),
    )
