"""`dam-vllm doctor` asks the real vLLM; its self-check finds a kernel that errs."""

import math

import pytest
import torch

from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.self_check import difference
from dam_vllm.diagnosis import diagnose

pytestmark = pytest.mark.engine


def test_this_installation_is_sound():
    found = diagnose()
    assert found.problems == []
    assert found.engine["platform"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.engine["error"] < found.engine["tolerance"]


@pytest.mark.parametrize("kernel", ["cpu_attention", "triton_attention"])
def test_the_self_check_compares(device, kernel):
    from dam_vllm.engine import doctor

    on_cpu = kernel == "cpu_attention"
    if on_cpu and device.type != "cpu":
        pytest.skip("serves on CPU")
    make, layout = getattr(doctor, kernel), KVLayout(keys_by_channel=on_cpu)
    dtype = torch.float32 if on_cpu else torch.float16
    assert difference(make, layout, dtype, device) < (1e-4 if on_cpu else 5e-3)

    class Errs:
        """Takes one row for another, or leaves it out."""

        def __init__(self, masks, row):
            self.attention, self.row = make(masks), row
            self.plan = self.attention.plan

        def run(self, plan, layer, query, cache, output):
            self.attention.run(plan, layer, query, cache, output)
            output[-1] = self.row if self.row is not None else output[0]

    assert difference(lambda masks: Errs(masks, None), layout, dtype, device) > 0.01
    assert difference(lambda masks: Errs(masks, math.nan), layout, dtype, device) > 1e38
