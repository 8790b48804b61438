"""Fixtures that all layers of the suite share."""

import functools
import os
import sys
from collections.abc import Callable

# Read when huggingface_hub is first imported: no test asks the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from tests.interpreted_triton import quicken

# Read when a kernel is defined: without a GPU, Triton's interpreter runs it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    quicken()

from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.dynamic_arrays import Dynamic
from dam_vllm.masks.fingerprint import Fingerprint
from dam_vllm.masks.mask_set import Header, HeadMode, MaskSet, pack_lower

SEED = "DAM_SEED"
# vllm/v1/attention/backends/cpu_attn.py
needs_fp8_on_cpu = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM serves an fp8 cache on CPUs with AVX-512 or AMX alone",
)


@functools.cache
def rows_round_alike():
    """Whether linear layers in bfloat16 give a row the same bits alone and beside others.

    Where a CPU has AVX-512 without products of bfloat16, oneDNN multiplies a single row by another
    kernel than several, with and without DAM, and prompts in chunks were seen to differ too.
    """
    draw = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 192, generator=draw).bfloat16() for n in (64, 2304))
    linear = torch.nn.functional.linear
    return torch.equal(
        torch.cat([linear(row, weight) for row in rows.split(1)]), linear(rows, weight)
    )


# Memory that tensors are cut out of is copied by every launch; a sort is a loop over elements.
INTERPRETED = {
    ("scratch", "PLAN_BYTES"): 4 << 20,
    ("choosing", "SCRATCH"): 4 << 20,
    ("select", "SCAN"): 64,
    ("select", "SORTED"): 16,
}


def interpreted(setting: Callable[[object, str, int], None]) -> None:
    """Makes what was loaded small enough for Triton's interpreter."""
    for (module, name), value in INTERPRETED.items():
        loaded = sys.modules.get(f"dam_vllm.attention.cuda.{module}")
        if loaded is not None:
            setting(loaded, name, value)


def fresh_seed() -> int:
    """A seed for a test: a new one in every run, or that of the variable DAM_SEED.

    It is printed, which pytest shows where a test fails.

    Raises:
        ValueError: if the variable is no seed.
    """
    given = os.environ.get(SEED)
    if given is not None and not (given.isdecimal() and int(given) < 2**32):
        raise ValueError(f"{SEED} is {given!r}: must be an integer from 0 to {2**32 - 1}")
    seed = int(given or np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed} ({SEED}={seed} pytest ... repeats it)")
    return seed


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton's interpreter runs kernels, every element costs."""
    if not torch.cuda.is_available():
        interpreted(monkeypatch.setattr)


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers in every run."""
    return np.random.default_rng(fresh_seed())


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a GPU, or this processor under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_mask_set(
    rng: np.random.Generator,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    pcl: int = 70,
    share: float = 0.03,
    true_share: float | None = None,
    dense: bool = False,
    dynamic: bool = False,
    reuse: bool = False,
    tails: bool = False,
    head_size: int = 24,
    fingerprint: Fingerprint | None = None,
) -> MaskSet:
    """A mask set with random columns, diagonals and an unrelated random true mask.

    The true mask is sparser unless said otherwise: a query block reads a page for any of its pairs.
    With `reuse` (and `dynamic`) some of the other heads follow random anchors; with `tails` random
    ones of those that are not dense have tails, the first such one in any case.
    """
    true_share = share * 0.02 if true_share is None else true_share
    modes = np.full((layers, kv_heads), HeadMode.STATIC, dtype=np.uint8)
    if dense:
        modes[0, 0] = HeadMode.DENSE
    if dynamic:
        modes[:, 1::2] = HeadMode.DYNAMIC
    if reuse:
        modes[:, 2::4] = modes[1::2, 0] = HeadMode.REUSE
    return MaskSet(
        columns=rng.random((layers, heads, pcl)) < share,
        diagonals=rng.random((layers, heads, pcl)) < share,
        true_bits=pack_lower(rng.random((layers, heads, pcl, pcl)) < true_share),
        modes=modes,
        header=Header(
            kind="calibrated",
            model="random",
            fingerprint=fingerprint or Fingerprint(config="0"),
            layer_types=["full"] * layers,
            pcl=pcl,
        ),
        dynamic=random_dynamic(rng, layers, kv_heads, head_size) if dynamic else None,
        anchors=random_anchors(rng, modes) if reuse else None,
        tails=random_tails(rng, modes) if tails else None,
    )


def random_anchors(rng: np.random.Generator, modes: np.ndarray) -> np.ndarray:
    """An anchor for each reusing head: a dynamic one of any layer up to its own."""
    anchors = np.full((*modes.shape, 2), -1, dtype=np.int32)
    for layer, head in np.argwhere(modes == HeadMode.REUSE):
        anchors[layer, head] = rng.choice(np.argwhere(modes[: layer + 1] == HeadMode.DYNAMIC))
    return anchors


def random_tails(rng: np.random.Generator, modes: np.ndarray) -> np.ndarray:
    """Which heads have tails."""
    sparse = modes != HeadMode.DENSE
    tails = sparse & (rng.random(modes.shape) < 0.5)
    tails[tuple(np.argwhere(sparse)[0])] = True
    return tails.astype(np.uint8)


def random_dynamic(rng: np.random.Generator, layers: int, kv_heads: int, head_size: int) -> Dynamic:
    """Random bases and budgets of all kinds."""
    shape = (layers, kv_heads)
    kinds = rng.integers(0, 3, shape).astype(np.uint8)
    budgets = np.array([rng.integers(1, 200, shape), rng.random(shape) / 5, rng.random(shape)])
    floors = rng.integers(0, 40, shape).astype(np.int32)
    return Dynamic(
        rotations=np.linalg.qr(rng.normal(size=(*shape, head_size, head_size)))[0].astype("f4"),
        channels=rng.integers(2, head_size + 1, shape).astype(np.int32),
        kinds=kinds,
        budgets=np.take_along_axis(budgets, kinds[None].astype(int), 0)[0].astype(np.float32),
        floors=floors,
        caps=floors + rng.integers(0, 300, shape).astype(np.int32),
        expected=np.where(kinds == BudgetKind.TOP_P, 0.1, 0).astype(np.float32),
    )


@pytest.fixture
def random_masks(rng: np.random.Generator) -> Callable[..., MaskSet]:
    """Makes random mask sets from the test's own random numbers."""
    return lambda **kwargs: random_mask_set(rng, **kwargs)


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures
