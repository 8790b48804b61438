from dataclasses import replace

import numpy as np
import pytest

from dam_vllm.masks.mask_set import HeadMode, lower_bytes, pack_lower, unpack_lower


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
    with pytest.raises(ValueError, match="a multiple of the 3 KV heads"):
        replace(masks, modes=np.zeros((2, 3), np.uint8))
    header = masks.header.model_copy(update={"layer_types": ["full"]})
    with pytest.raises(ValueError, match="layer_types names 1 layers"):
        replace(masks, header=header)


def following(masks, pairs):
    """Masks in which heads (layer, head) follow anchors (layer, head)."""
    modes, anchors = masks.modes.copy(), np.full((*masks.modes.shape, 2), -1, np.int32)
    for head, anchor in pairs.items():
        modes[head], anchors[head] = HeadMode.REUSE, anchor
    return replace(masks, modes=modes, anchors=anchors)


def test_heads_follow_dynamic_heads_of_their_layer_or_earlier_ones(random_masks):
    masks = random_masks(layers=3, heads=8, kv_heads=4, dynamic=True)  # heads 1 and 3
    made = following(masks, {(0, 0): (0, 3), (2, 2): (0, 1), (2, 1): (1, 3)})
    assert made.anchors[2, 2].tolist() == [0, 1]
    for pairs, message in (
        ({(1, 0): (2, 1)}, "its own layer or an earlier one"),
        ({(1, 0): (0, 4)}, "its own layer or an earlier one"),
        ({(1, 0): (0, 0)}, "layer 0, KV head 0, which is not dynamic"),
        ({(1, 0): (1, 0)}, "which is not dynamic"),
        ({(1, 0): (-1, 1)}, "its own layer or an earlier one"),
    ):
        with pytest.raises(ValueError, match=message):
            following(masks, pairs)
    with pytest.raises(ValueError, match="there are no anchors"):
        replace(made, anchors=None)
    with pytest.raises(ValueError, match="that reuses no pages has an anchor"):
        replace(made, modes=masks.modes)
    with pytest.raises(ValueError, match="anchors has shape"):
        replace(made, anchors=made.anchors[:2])
