"""DALI's crops are resized on a CPU as Pillow resizes them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nvcnn.data.resize import BatchResizer, resize

sides = st.integers(1, 80)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(image: np.ndarray, size: int) -> torch.Tensor:
    return torch.tensor(np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)))


@given(height=sides, width=sides, size=sides)
def test_values_are_pillow_s_to_a_level(height, width, size):
    out = torch.full((size + 2, size, 3), 77, dtype=torch.uint8)
    resize(torch.from_numpy(noise(height, width)), out[1:-1])
    assert (out[1:-1].int() - by_pillow(noise(height, width), size).int()).abs().max() <= 1
    assert (out[[0, -1]] == 77).all()  # nothing beyond is touched


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_of_any_sizes(threads):
    images = [noise(10 + i, 40 - 2 * i) for i in range(8)]
    batch = BatchResizer(threads)(list(map(torch.from_numpy, images)), 16)
    assert batch.is_contiguous()
    for got, image in zip(batch, images, strict=True):
        assert (got.int() - by_pillow(image, 16).int()).abs().max() <= 1


def test_an_error_in_a_thread_surfaces():
    with pytest.raises(RuntimeError):
        BatchResizer(2)([torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)], 16)
