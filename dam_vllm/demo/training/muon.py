"""Muon: momentum whose matrix updates are orthogonalised (Jordan et al., 2024)."""

from collections.abc import Sequence

import torch
from torch import Tensor

_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.02
# Quintic Newton-Schulz iteration that drives all singular values to about one.
_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replaces the singular values of matrices by about one.

    Args:
        matrices: (count, rows, columns), float.

    Returns:
        Matrices of the same shape, float32.
    """
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; matrices of one shape are orthogonalised together.

    Args:
        parameters: Matrices to train.
        lr: Learning rate; an update's singular values are about this size.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        super().__init__([{"params": same} for same in by_shape.values()], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the matrices from their gradients."""
        for group in self.param_groups:
            updates = []
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
                updates.append(parameter.grad.lerp(momentum, _MOMENTUM))
            rows, columns = group["params"][0].shape
            steps = orthogonalise(torch.stack(updates)) * max(1, rows / columns) ** 0.5
            for parameter, step in zip(group["params"], steps, strict=True):
                parameter.mul_(1 - group["lr"] * _WEIGHT_DECAY).add_(step, alpha=-group["lr"])
