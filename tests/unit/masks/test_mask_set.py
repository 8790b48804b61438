from dataclasses import replace

import numpy as np
import pytest

from dam_vllm.masks.mask_set import lower_bytes, pack_lower, unpack_lower


@pytest.mark.parametrize("pcl", [1, 7, 8, 63, 111])
def test_packed_triangle_comes_back(rng, pcl):
    mask = np.tril(rng.random((3, 2, pcl, pcl)) < 0.4)
    bits = pack_lower(mask)
    assert bits.shape == (3, 2, lower_bytes(pcl))
    np.testing.assert_array_equal(unpack_lower(bits, pcl), mask)


def test_what_lies_above_the_diagonal_is_dropped():
    assert (unpack_lower(pack_lower(np.ones((5, 5), bool)), 5) == np.tri(5, dtype=bool)).all()


def test_true_mask_of_a_layer(random_masks):
    masks = random_masks(pcl=19)
    np.testing.assert_array_equal(masks.true_mask(1), unpack_lower(masks.true_bits, 19)[1])


def test_arrays_that_do_not_fit_each_other_are_refused(random_masks):
    masks = random_masks()
    with pytest.raises(ValueError, match="diagonals has shape"):
        replace(masks, diagonals=masks.diagonals[:, :, :-1])
    with pytest.raises(ValueError, match="no multiple"):
        replace(masks, modes=np.zeros((2, 3), np.uint8))
    header = masks.header.model_copy(update={"layer_types": ["full"]})
    with pytest.raises(ValueError, match="layer_types names 1 layers"):
        replace(masks, header=header)
