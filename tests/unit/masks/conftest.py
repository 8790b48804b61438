"""Mask sets whose patterns go beyond the PCL."""

import dataclasses

import pytest


@pytest.fixture
def reaching_masks(random_masks, rng):
    """Like `random_masks`, with columns and diagonals up to a reach, or to the PCL for None."""

    def make(reach, share=0.03, **kwargs):
        masks = random_masks(share=share, **kwargs)
        if reach is None:
            return masks
        columns, diagonals = rng.random((2, masks.layers, masks.heads, reach)) < share
        header = masks.header.model_copy(update={"reach": reach})
        return dataclasses.replace(masks, columns=columns, diagonals=diagonals, header=header)

    return make
