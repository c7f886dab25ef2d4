"""Images as pictures to look at: flextok_jax.to_pil and flextok_jax.show_grid."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from flextok_jax.core import images as images_lib
from flextok_jax.evals import grids


def to_pil(images: Any) -> list[Image.Image]:
  """Converts images [b, h, w, 3], uint8 or float in [-1, 1] and clipped, or one image [h, w, 3], to Pillow images.

  Raises:
    ValueError: an array of another shape.
  """
  return [Image.fromarray(image) for image in _to_uint8(images)]


def show_grid(images: Any, labels: Sequence[str] | None = None, columns: int = 8) -> Image.Image:
  """Draws images, as to_pil takes them, from left to right in lines of `columns`, below their labels.

  Returns:
    A Pillow image, which notebooks show.

  Raises:
    ValueError: an array of another shape, or not one label for each image.
  """
  pixels = _to_uint8(images)
  names = [""] * len(pixels) if labels is None else [str(label) for label in labels]
  if len(names) != len(pixels) or columns < 1:
    raise ValueError(f"{len(names)} labels for {len(pixels)} images in {columns} columns: give a label for each image")
  return grids.strip(pixels, names, columns)


def _to_uint8(images: Any) -> np.ndarray:
  x = jnp.asarray(images)
  x = x[None] if x.ndim == 3 else x
  if x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
    raise ValueError(f"images must have shape [b, h, w, 3] or [h, w, 3], got {list(jnp.shape(images))}")
  if x.dtype == jnp.uint8:
    return np.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"images must be uint8 or floating point in [-1, 1], got {x.dtype}")
  return np.asarray(images_lib.as_uint8(x))
