import numpy as np
import pytest
import torch

from dam_vllm.calibration.settings import Amplification
from dam_vllm.calibration.static.amplify import Statistics, amplify

LAYERS, HEADS, PCL = 3, 2, 9
SMALLEST = 5e-4


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    # Scales differ between layers and heads, so that local statistics would be wrong.
    scale = 10.0 ** -rng.integers(0, 3, (LAYERS, HEADS, 1, 1))
    return (np.tril(rng.random((LAYERS, HEADS, PCL, PCL)) ** 4 * scale + SMALLEST)).astype(
        np.float32
    )


COUNTS = np.arange(2 * PCL, PCL, -1)


def naive(name, maps, power, epsilon):
    valid = maps[:, :, np.tri(PCL, dtype=bool)]
    floored = np.maximum(maps, epsilon)

    def box_cox(x):
        return np.log(x) if power == 0 else (x**power - 1) / power

    return {
        "box-cox": lambda: box_cox(floored) - box_cox(np.maximum(valid, epsilon)).min(),
        "sqrt": lambda: np.sqrt(maps),
        "log": lambda: np.log(floored),
        "yeo-johnson": lambda: box_cox(maps + 1),
        "z-score": lambda: (maps - valid.mean()) / valid.std(),
        "min-max": lambda: (maps - valid.min()) / (valid.max() - valid.min()),
        "average": lambda: maps,
        "sum": lambda: maps * COUNTS[:, None],
        "arcsinh": lambda: np.arcsinh(maps),
    }[name]()


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3])  # below and above the smallest mean
@pytest.mark.parametrize("power", [0.5, 0, -1])
@pytest.mark.parametrize(
    "name",
    ["box-cox", "sqrt", "log", "yeo-johnson", "z-score", "min-max", "average", "sum", "arcsinh"],
)
def test_amplify_equals_the_naive_formula(maps, name, power, epsilon):
    settings = Amplification.model_validate({"name": name, "lambda": power, "epsilon": epsilon})
    statistics = Statistics()
    for layer in maps:
        statistics.update(torch.from_numpy(layer))
    expected = naive(name, maps.astype(np.float64), power, epsilon)
    lower = np.tri(PCL, dtype=bool)
    for layer in range(LAYERS):
        found = amplify(torch.from_numpy(maps[layer]), COUNTS, statistics, settings).numpy()
        np.testing.assert_allclose(found[:, lower], expected[layer][:, lower], rtol=1e-4, atol=1e-3)


def test_statistics_leave_the_future_out():
    statistics = Statistics()
    statistics.update(torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]))
    assert (statistics.minimum, statistics.maximum, statistics.pairs) == (0.25, 1.0, 3)
    assert statistics.mean == pytest.approx(2 / 3)
