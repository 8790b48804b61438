import numpy as np
import pytest

from dam_vllm.masks.rule import allowed, token_mask


def by_definition(masks, layer, i, j):
    """The rule of the paper for one pair, head by head."""
    if j > i:
        return np.zeros(masks.heads, bool)
    if i < masks.pcl:
        return masks.true_mask(layer)[:, i, j]
    column = masks.columns[layer, :, j] if j < masks.reach else False
    diagonal = masks.diagonals[layer, :, i - j] if i - j < masks.reach else False
    return np.zeros(masks.heads, bool) | column | diagonal


@pytest.mark.parametrize("reach", [None, 50])
@pytest.mark.parametrize(("start", "stop"), [(0, 13), (0, 61), (17, 44), (29, 35), (40, 77)])
def test_rule(reaching_masks, start, stop, reach):
    masks = reaching_masks(reach, pcl=31, share=0.2, true_share=0.2)
    mask = allowed(masks, 1, start, stop)
    assert mask.shape == (masks.heads, stop - start, stop)
    for i in range(start, stop):
        for j in range(stop):
            np.testing.assert_array_equal(mask[:, i - start, j], by_definition(masks, 1, i, j))


def test_every_row_sees_the_first_token_and_itself(random_masks):
    masks = random_masks(share=0.0)
    mask = token_mask(masks, 0, 50, 99)
    assert mask[:, :, 0].all()
    assert mask[:, np.arange(49), np.arange(50, 99)].all()
    assert mask.sum() == 2 * 49 * masks.heads
