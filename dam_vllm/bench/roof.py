"""The two ceilings of a GPU, measured on it: bytes that it moves and bf16 products that it does."""

import functools
import statistics
from dataclasses import dataclass
from importlib.metadata import version

import torch

from dam_vllm.bench.gpu_timing import Call, CudaTimer, Timer

COPIED, SIDE, ROUNDS = 4 * 2**30, 8192, 20


@dataclass(frozen=True)
class Work:
    """What a step takes at least.

    Attributes:
        flops: floating-point operations.
        bytes: read and written.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Roof:
    """What a device does at most.

    Attributes:
        bandwidth: bytes a second, those read and those written.
        rate: bf16 operations a second.
    """

    bandwidth: float
    rate: float

    def seconds(self, work: Work) -> float:
        """The shortest time in which some work can be done."""
        return max(work.bytes / self.bandwidth, work.flops / self.rate)

    def bound(self, work: Work) -> str:
        """What that time is spent on."""
        memory = work.bytes / self.bandwidth > work.flops / self.rate
        return "memory" if memory else "compute"


def measure(
    device: torch.device, timer: Timer, copied: int = COPIED, side: int = SIDE, rounds: int = ROUNDS
) -> Roof:
    """Copies a large buffer and multiplies large matrices.

    Args:
        device: where.
        timer: that of the device.
        copied: bytes of the buffer.
        side: rows and columns of the matrices.
        rounds: measurements of each, the median counts.

    Returns:
        The ceilings.
    """
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    # Random numbers, since products of zeros draw less power and run faster.
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    # By a kernel: a copy as such is left to the copy engine, which is slower on some GPUs.
    copy = _median(timer, lambda: torch.neg(source, out=target), rounds)
    multiply = _median(timer, lambda: torch.mm(left, right, out=product), rounds)
    return Roof(2 * copied / copy, 2 * side**3 / multiply)


@functools.cache
def cuda_roof() -> Roof:
    """The ceilings of the GPU at hand, measured once."""
    found = measure(torch.device("cuda"), CudaTimer())
    torch.cuda.empty_cache()
    return found


def _median(timer: Timer, call: Call, rounds: int) -> float:
    call()
    run = timer.bind([call])
    timer.seconds(run)
    return statistics.median(timer.seconds(run) for _ in range(rounds))


def gpu_machine() -> dict[str, str | int | float]:
    """The GPU, its ceilings and the version of Triton, beside `dam_vllm.machine.machine`."""
    roof = cuda_roof()
    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_tb_s": round(roof.bandwidth / 1e12, 2),
        "bf16_tflop_s": round(roof.rate / 1e12),
        "triton": version("triton"),
    }
