"""Bases in which dynamic heads score tokens: the keys' principal directions, per KV head."""

import numpy as np
import torch

from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.mask_set import FloatArray


class KeyCovariance:
    """Hook that sums the keys' first and second moments (Loki, arXiv 2406.02542).

    A direction in which all keys are alike adds the same to every score and tells no page from
    another, so the covariance is centred, text by text.
    """

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    def __call__(self, states: LayerStates) -> None:
        key = states.key.double()
        centred = key - key.mean(dim=1, keepdim=True)
        added = centred.transpose(1, 2) @ centred / key.shape[1]
        self._sums[states.layer] = self._sums.get(states.layer, torch.zeros_like(added)) + added

    def rotations(self, layers: int, kv_heads: int) -> FloatArray:
        """Orthogonal bases, directions of largest variance first.

        Args:
            layers: layers of the model; those not seen get the identity.
            kv_heads: KV heads a layer.

        Returns:
            float32 [layers, kv_heads, head_size, head_size], directions in columns.
        """
        size = next(iter(self._sums.values())).shape[-1]
        result = np.tile(np.eye(size, dtype=np.float32), (layers, kv_heads, 1, 1))
        for layer, covariance in self._sums.items():
            directions = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
            result[layer] = directions.float().cpu().numpy()
        return result
