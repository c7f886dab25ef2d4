"""The pictures that ship."""

import numpy as np

from flextok_jax.core import assets


def test_pictures_have_captions():
  pictures = assets.pictures()
  assert len(pictures) == 48 and all(caption.count(", ") for _, caption in pictures)
  sheet = np.concatenate([np.concatenate([x for x, _ in pictures[i : i + 8]], 1) for i in range(0, 48, 8)])
  assert sheet.shape == (6 * assets.SIDE, 8 * assets.SIDE, 3) and sheet.dtype == np.uint8
  # Each has its own background: the borders between pictures are the steepest places of the sheet.
  steps = np.abs(np.diff(sheet.astype(int), axis=1)).mean((0, 2))
  assert steps[assets.SIDE - 1 :: assets.SIDE].min() > 2 * np.median(steps)
