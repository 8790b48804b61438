"""Probes against whole runs of the model under the same masks."""

from types import SimpleNamespace

import numpy as np
import pytest

from dam_vllm.calibration.capture import register
from dam_vllm.calibration.fit.inputs import FitInputs, compared_rows
from dam_vllm.calibration.fit.probes import _Probed, alone, mean_kl
from dam_vllm.calibration.fit.samples import FitText
from dam_vllm.calibration.fit.simulate import Simulation
from dam_vllm.calibration.fit.states import hooked, prepare, run
from dam_vllm.calibration.settings import FitConfig
from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.model_shape import model_shape
from tests.unit.calibration.conftest import build

PAGE = 16
# Of a question's text: it ends within the page that begins at 112.
PROMPT, LENGTH = 121, 133


@pytest.fixture
def probed(rng):
    """What probes a text of a kind."""

    def make(kind):
        register()
        model = build("gqa")
        prepare(model)
        config = FitConfig(target_density=0.5, page=PAGE, platform="cpu")
        work = SimpleNamespace(advance=lambda *given: False)
        inputs = FitInputs(model, model_shape(model.config), config, [], None, work, 2**24)
        ids = rng.integers(3, 64, LENGTH).tolist()
        return _Probed(inputs, FitText(kind, ids, LENGTH if kind == "plain" else PROMPT))

    return make


@pytest.mark.parametrize(
    ("kind", "spans"),
    [("plain", [(0, LENGTH)]), ("kv", [(0, 112), (112, PROMPT), (PROMPT, LENGTH)])],
)
def test_each_part_is_probed_apart(random_masks, probed, kind, spans):
    each = probed(kind)
    # That choose nothing: static heads would read all of so short a text.
    masks = random_masks(
        layers=3, heads=4, kv_heads=2, pcl=32, share=0.0, dynamic=True, head_size=8
    )
    masks.modes[:] = HeadMode.DYNAMIC
    masks.dynamic.kinds[:] = BudgetKind.TOP_K
    masks.dynamic.budgets[:] = masks.dynamic.caps[:] = 0
    masks.dynamic.floors[:] = 0
    text, model = each.text, each.inputs.model
    rows = compared_rows(text, 256)
    full = run(model, text.ids, rows)
    for layer in (0, 2):
        found = each.layer(layer, [masks])[0]
        for part, span in enumerate(spans):
            for head in range(3):
                simulation = Simulation(alone(masks, layer, head), PAGE, text.prompt, span)
                with hooked(simulation):
                    wanted = mean_kl(full, run(model, text.ids, rows))
                if kind == "kv" and part == 0 and head < 2:
                    assert np.isnan(found[part, head])
                else:
                    assert found[part, head] == pytest.approx(wanted, rel=1e-2, abs=1e-12)
                    # Errors of context in the last layer meet no row that is compared.
                    assert wanted > 1e-10 or (kind == "kv" and part == 0 and layer == 2)
        assert not found[len(spans) :].any()
