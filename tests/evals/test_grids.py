"""Grids of labelled images."""

from flextok_jax.evals import grids


def test_large_images_keep_their_size():
  left, top, right, bottom = grids.cell_box(0, 0, 100, 128)
  assert (right - left, bottom - top) == (128, 100)
