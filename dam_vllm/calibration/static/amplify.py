"""The nine amplifications of mean attention (paper, Stage 1 and appendix).

With A the mean attention of a pair, C the number of windows that hold it, and m, M, mean and
std over all valid pairs (j <= i) of all layers and heads:

    box-cox      B(max(A, e)) - min B,  B(x) = (x^l - 1) / l, or ln x for l = 0
    sqrt         sqrt(A)
    log          ln(max(A, e))
    yeo-johnson  ((A + 1)^l - 1) / l, or ln(A + 1) for l = 0
    z-score      (A - mean) / std
    min-max      (A - m) / (M - m)
    average      A
    sum          A C
    arcsinh      arcsinh(A)

Box-Cox is increasing, so min B is B(max(m, e)): one pass over the maps finds all that is
needed from all layers, a second one amplifies layer by layer.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from dam_vllm.calibration.settings import Amplification


@dataclass
class Statistics:
    """Of the mean attention of all valid pairs; updated layer by layer in float64."""

    minimum: float = math.inf
    maximum: float = -math.inf
    total: float = 0.0
    squares: float = 0.0
    pairs: int = 0

    def update(self, mean: torch.Tensor) -> None:
        """Adds one layer's mean map, float32 [heads, pcl, pcl]."""
        for head in mean:
            valid = head[torch.ones_like(head, dtype=torch.bool).tril()].double()
            self.minimum = min(self.minimum, float(valid.min()))
            self.maximum = max(self.maximum, float(valid.max()))
            self.total += float(valid.sum())
            self.squares += float(valid.square().sum())
            self.pairs += valid.numel()

    @property
    def mean(self) -> float:
        """Mean over all pairs."""
        return self.total / self.pairs

    @property
    def deviation(self) -> float:
        """Standard deviation over all pairs."""
        return math.sqrt(max(0.0, self.squares / self.pairs - self.mean**2))

    def report(self) -> dict[str, float]:
        """What the mask file records."""
        return {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "mean": self.mean,
            "deviation": self.deviation,
        }


def amplify(
    mean: torch.Tensor, counts: np.ndarray, statistics: Statistics, settings: Amplification
) -> torch.Tensor:
    """Amplifies one layer's mean map.

    Args:
        mean: float32 [heads, pcl, pcl]; entries above the diagonal are no attention.
        counts: int64 [pcl], windows that hold a query at each position.
        statistics: over all layers.
        settings: which function, lambda and epsilon.

    Returns:
        float32 [heads, pcl, pcl]; entries above the diagonal have no meaning.
    """
    power, epsilon = settings.lambda_, settings.epsilon
    match settings.name:
        case "box-cox":
            floor = max(statistics.minimum, epsilon)
            return _box_cox(mean.clamp(min=epsilon), power) - _box_cox_scalar(floor, power)
        case "sqrt":
            return mean.sqrt()
        case "log":
            return mean.clamp(min=epsilon).log()
        case "yeo-johnson":
            return mean.log1p() if power == 0 else _box_cox(mean + 1, power)
        case "z-score":
            return (mean - statistics.mean) / max(statistics.deviation, epsilon)
        case "min-max":
            span = max(statistics.maximum - statistics.minimum, epsilon)
            return (mean - statistics.minimum) / span
        case "average":
            return mean
        case "sum":
            return mean * torch.from_numpy(counts).to(mean.device, mean.dtype)[:, None]
        case "arcsinh":
            return mean.asinh()


def _box_cox(x: torch.Tensor, power: float) -> torch.Tensor:
    return x.log() if power == 0 else x.pow(power).sub_(1).div_(power)


def _box_cox_scalar(x: float, power: float) -> float:
    return math.log(x) if power == 0 else (x**power - 1) / power
