"""Formats of image files; images as floats and as 8-bit levels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# The formats that are read, {Pillow's name: extensions}: pure codecs, none of which starts a program.
FORMATS = {
  "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
  "PNG": (".png", ".apng"),
  "WEBP": (".webp",),
  "GIF": (".gif",),
  "TIFF": (".tif", ".tiff"),
  "BMP": (".bmp",),
  "DIB": (".dib",),
  "AVIF": (".avif", ".avifs"),
  "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
  "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
  "QOI": (".qoi",),
  "ICO": (".ico",),
  "PCX": (".pcx",),
  "SGI": (".sgi",),
  "TGA": (".tga",),  # without a signature
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)


def to_float(images: jax.Array) -> jax.Array:
  """uint8 in [0, 255] or float in [-1, 1] -> float32 in [-1, 1]."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 127.5 - 1
  return images.astype(jnp.float32)


def round_to_8bit(images: jax.Array) -> jax.Array:
  """Rounds float images in [-1, 1] to the 256 levels a PNG stores: float32 in [0, 1]. NaN stays NaN."""
  return jnp.round(jnp.clip((images.astype(jnp.float32) + 1) * 127.5, 0, 255)) / 255


def to_uint8(images: jax.Array) -> jax.Array:
  """Converts images of round_to_8bit, in [0, 1], to uint8."""
  return jnp.round(images * 255).astype(jnp.uint8)


def as_uint8(images: jax.Array) -> jax.Array:
  """Converts float images in [-1, 1] to uint8; values beyond are clipped."""
  return to_uint8(round_to_8bit(images))


def pad_together(batches: Sequence[np.ndarray]) -> np.ndarray:
  """Joins batches of images uint8 [b, h, w, 3] of any sizes, centred on white of the largest height and width."""
  height, width = (max(images.shape[axis] for images in batches) for axis in (1, 2))

  def pad(images: np.ndarray) -> np.ndarray:
    down, right = height - images.shape[1], width - images.shape[2]
    return np.pad(
      images, ((0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0)), constant_values=255
    )

  return np.concatenate([pad(images) for images in batches])
