import numpy as np
import pytest
import torch

from dam_vllm.calibration.settings import Amplification, CalibrationConfig
from dam_vllm.calibration.static.amplify import Statistics
from dam_vllm.calibration.static.build import layer_patterns_beyond
from dam_vllm.calibration.static.maps import pair_counts
from dam_vllm.calibration.static.page_patterns import split_mass
from dam_vllm.masks.fingerprint import Fingerprint
from dam_vllm.masks.mask_set import Header, MaskSet, lower_bytes
from dam_vllm.masks.page_tables import page_tables

PAGE, PAGES, PCL = 8, 40, 64
REACH = PAGE * PAGES
TAU, MU = 0.3, 0.8
WORTH = 0.0225  # mean attention that tau keeps
STATISTICS = Statistics(minimum=0.0, maximum=1.0, total=1.0, squares=1.0, pairs=10)
CONFIG = CalibrationConfig(pcl=PCL, reach=REACH, map_page=PAGE, tau=TAU, mu=MU)


def spread(share=0.5):
    """Token map of a head: the first key's share, the rest evenly over all keys; [reach, reach]."""
    rows = np.arange(1, REACH + 1)[:, None]
    weights = np.tril(np.ones((REACH, REACH))) * (1 - share) / rows
    weights[:, 0] += share
    return weights


def page_map(weights):
    """Means over each query page of the mass on each key page: float32 [1, pages, pages]."""
    pages = weights.reshape(PAGES, PAGE, PAGES, PAGE).sum(axis=3).mean(axis=1)
    return torch.from_numpy(pages[None].astype(np.float32))


def beyond(weights, **kwargs):
    """Kept token columns and diagonals from the PCL on, each a sorted list of positions."""
    counts = pair_counts([REACH] * 3, PAGES, PAGE)
    settings = {"config": CONFIG, "tau": TAU, "mu": MU} | kwargs
    found = layer_patterns_beyond(page_map(weights), counts, PCL, statistics=STATISTICS, **settings)
    return [
        (bits[0].nonzero().flatten() + PCL).tolist() for bits in (found.columns, found.diagonals)
    ]


def page_tokens(*pages):
    return [token for page in pages for token in range(page * PAGE, (page + 1) * PAGE)]


def test_a_planted_column_is_found_exactly():
    weights = spread()
    for key in (100, 155):
        weights[key:, key] += 1.1 * WORTH
    assert beyond(weights) == [page_tokens(12, 19), []]


@pytest.mark.parametrize("distance", range(96, 105))
def test_a_planted_diagonal_is_found_wherever_it_crosses_pages(distance):
    weights = spread()
    rows = np.arange(distance, REACH)
    weights[rows, rows - distance] += 1.1 * WORTH
    first, last = distance // PAGE * PAGE, -(-distance // PAGE) * PAGE
    assert beyond(weights) == [[], list(range(first, last + 1))]


@pytest.mark.parametrize("distance", [96, 100, 104])
def test_a_strong_diagonal_takes_no_page_pairs_beside_its_own(distance):
    weights = spread()
    rows = np.arange(distance, REACH)
    weights[rows, rows - distance] += 10 * WORTH
    for page in range(1, PAGES):  # a little on every page pair around it
        rows = np.arange(page * PAGE, REACH)
        weights[rows, rows // PAGE * PAGE - page * PAGE] += 0.2 * WORTH * (9 < page < 16)
    first, last = distance // PAGE * PAGE, -(-distance // PAGE) * PAGE
    assert beyond(weights) == [[], list(range(first, last + 1))]


def test_weaker_patterns_than_tau_are_not_kept():
    weights = spread()
    rows = np.arange(100, REACH)
    weights[100:, 100] += 0.8 * WORTH
    weights[rows, rows - 100] += 0.8 * WORTH
    assert beyond(weights) == [[], []]
    assert beyond(weights, tau=0.26) == [page_tokens(12), list(range(96, 105))]


def test_an_even_row_keeps_nothing_though_its_pages_weigh_more_than_tau():
    weights = spread(share=0)
    assert page_map(weights)[0, -1, :-1].min() > WORTH
    assert beyond(weights) == [[], []]


def test_mu_is_the_share_of_the_query_pages_after_a_column():
    weights = spread()
    key = 15 * PAGE + 3
    weights[(PAGES - 12) * PAGE :, key] += 1.5 * WORTH  # 12 of the 24 query pages after page 15
    assert beyond(weights, mu=0.5)[0] == page_tokens(15)
    assert beyond(weights, mu=0.51)[0] == []


def test_patterns_near_the_reach_need_support():
    weights = spread()
    for page in (PAGES - 6, PAGES - 5):  # with 5 and 4 query pages after them
        weights[page * PAGE :, page * PAGE] += 2 * WORTH
    assert beyond(weights)[0] == page_tokens(PAGES - 6)
    config = CONFIG.model_copy(update={"min_support": 4 * PCL // PAGES})
    assert beyond(weights, config=config)[0] == page_tokens(PAGES - 6, PAGES - 5)


def test_patterns_below_the_pcl_are_left_to_the_token_maps():
    weights = spread()
    weights[PCL - 1 :, PCL - 1] += 2 * WORTH
    weights[PCL:, PCL] += 2 * WORTH
    assert beyond(weights)[0] == page_tokens(PCL // PAGE)


def test_a_pcl_inside_a_page_starts_there():
    weights = spread()
    weights[PCL + 2 :, PCL + 2] += 2 * WORTH
    counts = pair_counts([REACH], PAGES, PAGE)
    found = layer_patterns_beyond(page_map(weights), counts, PCL + 3, STATISTICS, CONFIG, TAU, MU)
    assert found.columns.shape == (1, REACH - PCL - 3)
    assert found.columns[0].nonzero().flatten().tolist() == list(range(PAGE - 3))


def test_peaks_are_what_stands_out_of_a_row():
    weights = spread(share=0)
    weights[200:, 120] += 0.01
    excess, usual = (part[0].numpy() for part in split_mass(page_map(weights), PAGE))
    peak = excess + usual
    even = page_map(spread(share=0))[0].numpy()
    np.testing.assert_allclose(peak[30, 15], 0.01 + even[30, 3] / PAGE, rtol=1e-4)
    np.testing.assert_allclose(peak[30, 3], even[30, 3] / PAGE, rtol=1e-4)
    assert not np.triu(peak, 1).any()


@pytest.mark.parametrize("name", ["sqrt", "z-score", "min-max", "average", "sum", "arcsinh"])
def test_every_amplification_serves(name):
    weights = spread()
    weights[100:, 100] += 0.05
    tau = {"sum": 3 * 0.02, "sqrt": 0.02**0.5, "z-score": -0.25}.get(name, 0.02)
    config = CONFIG.model_copy(update={"amplification": Amplification(name=name)})
    assert beyond(weights, config=config, tau=tau)[0] == page_tokens(12)


def masks_of(columns, diagonals):
    shape = (1, 1, REACH)
    arrays = []
    for kept in (columns, diagonals):
        arrays.append(np.zeros(shape, dtype=bool))
        arrays[-1][0, 0, kept] = True
    return MaskSet(
        *arrays,
        true_bits=np.zeros((1, 1, lower_bytes(PCL)), dtype=np.uint8),
        modes=np.zeros((1, 1), dtype=np.uint8),
        header=Header(
            kind="calibrated",
            model="m",
            fingerprint=Fingerprint(config="0"),
            layer_types=["full"],
            pcl=PCL,
            reach=REACH,
        ),
    )


@pytest.mark.parametrize("distance", [96, 97, 103])
def test_served_pages_are_those_of_the_planted_patterns(distance):
    """With pages and query blocks of the maps' size, neither more nor less."""
    weights = spread()
    rows = np.arange(distance, REACH)
    weights[rows, rows - distance] += 1.1 * WORTH
    weights[155:, 155] += 1.1 * WORTH
    tables = page_tables(masks_of(*beyond(weights)), 0, PAGE, query_block=PAGE)
    block = 30
    needed = {0, 155 // PAGE, block}
    needed |= {(row - distance) // PAGE for row in range(block * PAGE, (block + 1) * PAGE)}
    served = set(tables.select(np.array([block]))[0, 0].nonzero()[0].tolist())
    assert served == needed
