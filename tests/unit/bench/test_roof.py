import pytest
import torch

from dam_vllm.bench.roof import Roof, Work, measure
from tests.unit.bench.host_timer import HostTimer


def test_the_longer_time_binds():
    roof = Roof(bandwidth=100.0, rate=1000.0)
    assert roof.seconds(Work(flops=2000, bytes=100)) == 2
    assert roof.bound(Work(flops=2000, bytes=100)) == "compute"
    assert roof.seconds(Work(flops=2000, bytes=300)) == 3
    assert roof.bound(Work(flops=2000, bytes=300)) == "memory"


def test_bytes_count_twice_and_products_as_two():
    roof = measure(torch.device("cpu"), HostTimer(told=0.5), copied=1000, side=10, rounds=2)
    assert roof == Roof(bandwidth=pytest.approx(4000), rate=pytest.approx(4000))
