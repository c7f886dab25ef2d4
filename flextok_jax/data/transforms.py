"""Converts stored images of any mode to uint8 RGB arrays of one size."""

import io
import os
import struct
from typing import Any
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from flextok_jax.core import files
from flextok_jax.core.errors import first_line
from flextok_jax.data import listing

# Pillow's errors for files that are missing, no images, truncated, corrupt or too large.
DECODE_ERRORS = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  IndexError,
  struct.error,
  zlib.error,
  Image.DecompressionBombError,
)
MAX_ASPECT = 64  # longer strips are cut to this aspect ratio before they are resized, to bound memory
REDUCTIONS = (8, 4, 2)  # libjpeg can decode at 1 / these sizes, which is faster
# EXIF orientations with swapped sides; with the end of a stored row or column on the left; and with it at the top.
_TURNED, _FROM_RIGHT, _FROM_BELOW = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)


def to_rgb(image: Any) -> Image.Image:
  """Returns a Pillow RGB image of a Pillow image, a path, an open file, or an array [h, w] or [h, w, 1, 3 or 4].

  EXIF rotation is applied; transparent images are composited on white; 16-bit values are scaled by 1/257 to 8 bits;
  Pillow converts CMYK, palette and grey. Arrays are uint8, uint16, bool, or floating point in [0, 1].
  """
  if isinstance(image, (str, os.PathLike, io.IOBase)):
    with Image.open(image) as opened:  # type: ignore[arg-type]
      return to_rgb(opened)
  if not isinstance(image, Image.Image):
    image = _from_array(np.asarray(image))
  image.load()
  if _orientation(image) != 1:
    image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):  # 16-bit grey (I;16 and its byte orders) or 32-bit integers holding 16-bit values
    values = np.asarray(image).astype(np.int64)
    image = Image.fromarray((np.clip(values, 0, 65535) / 257.0 + 0.5).astype(np.uint8))
  elif image.mode == "F":
    image = _from_array(np.asarray(image))
  if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
  return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
  """Returns the EXIF orientation of an opened image; 1 is upright."""
  return image.getexif().get(ExifTags.Base.Orientation, 1)


def _from_array(array: np.ndarray) -> Image.Image:
  if array.ndim == 3 and array.shape[2] == 1:
    array = array[:, :, 0]
  if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
    raise ValueError(f"an image array must have shape [h, w] or [h, w, 1, 3 or 4], got {list(array.shape)}")
  if array.dtype == bool:
    array = array.astype(np.uint8) * 255
  elif array.dtype == np.uint16:
    array = (array / 257.0 + 0.5).astype(np.uint8)
  elif np.issubdtype(array.dtype, np.floating):
    array = (np.clip(np.nan_to_num(array), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
  elif array.dtype != np.uint8:
    raise ValueError(f"an image array must be uint8, uint16, bool or floating point, got {array.dtype}")
  return Image.fromarray(np.ascontiguousarray(array))


def _open(image: Any) -> Image.Image:
  """Returns a Pillow image that is not decoded yet for an open JPEG file, and to_rgb for anything else."""
  if isinstance(image, io.IOBase):
    image = Image.open(image)  # type: ignore[arg-type]
    if isinstance(image, JpegImagePlugin.JpegImageFile):
      return image
  return to_rgb(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
  """Returns (width, height) of to_rgb(image)."""
  return image.size[::-1] if _orientation(image) in _TURNED else image.size


def _decode(image: Image.Image, box: tuple[float, ...], pixels: int) -> tuple[Image.Image, tuple[float, ...]]:
  """Decodes an image from _open, a JPEG at 1/8, 1/4 or 1/2 if its region `box` keeps `pixels` pixels per side.

  Returns:
    (RGB image, box in its pixels), where a box is (left, top, right, bottom).
  """
  width, height = _upright_size(image)
  orientation = _orientation(image)
  side = min(box[2] - box[0], box[3] - box[1])
  factor = next((factor for factor in REDUCTIONS if side >= factor * pixels), 1)
  # draft returns None, and has no effect, if the image is decoded already or no JPEG.
  if factor == 1 or image.draft(None, (image.width // factor, image.height // factor)) is None:
    return to_rgb(image), box
  image = to_rgb(image)
  # A pixel covers factor x factor stored pixels; in the last column and row fewer, if factor does not divide the sides.
  # What is missing shifts the other pixels if the orientation puts that column on the left, or that row on top.
  left = image.width - width / factor if orientation in _FROM_RIGHT else 0
  top = image.height - height / factor if orientation in _FROM_BELOW else 0
  return image, tuple(edge / factor + shift for edge, shift in zip(box, (left, top, left, top)))


def center_crop(image: Any, size: int, reduce: bool = False) -> np.ndarray:
  """Resizes the shorter side to size, bilinear and antialiased, and crops the centre: uint8 [size, size, 3].

  Bit-identical to torchvision's Resize(size) and CenterCrop(size) of a Pillow image, the preprocessing of the
  reference; strips longer than MAX_ASPECT times their width lose their ends first.

  Args:
    image: see to_rgb.
    reduce: whether an open JPEG file of at least twice the size is decoded at 1/2, 1/4 or 1/8, which is faster but not
      bit-identical.
  """
  image = _open(image) if reduce else to_rgb(image)
  width, height = _upright_size(image)
  limit = MAX_ASPECT * min(width, height)
  if max(width, height) > limit:
    left, top = max(width - limit, 0) // 2, max(height - limit, 0) // 2
    image = to_rgb(image).crop((left, top, left + min(width, limit), top + min(height, limit)))
    width, height = image.size
  image, box = _decode(image, (0, 0, width, height), size)
  short = min(width, height)
  width, height = size * width // short, size * height // short
  if (width, height) != image.size:
    image = image.resize((width, height), Image.Resampling.BILINEAR, box)
  left, top = round((width - size) / 2.0), round((height - size) / 2.0)  # halves to even, like torchvision
  return np.asarray(image)[top : top + size, left : left + size].copy()


def random_box(width: int, height: int, rng: np.random.Generator, min_area: float) -> tuple[int, int, int, int]:
  """Draws (left, top, right, bottom) with a share min_area to 1 of the area and an aspect ratio of 3/4 to 4/3.

  Returns the largest centre square if ten draws do not fit.
  """
  for _ in range(10):
    area = width * height * rng.uniform(min_area, 1.0)
    ratio = np.exp(rng.uniform(np.log(3.0 / 4.0), np.log(4.0 / 3.0)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      break
  else:
    w = h = min(width, height)
    left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_resized_crop(
  image: Any, size: int, rng: np.random.Generator, min_area: float, reduce: bool = False
) -> np.ndarray:
  """Returns the region of random_box, resized to uint8 [size, size, 3].

  Antialiased bilinear, like center_crop and torchvision's RandomResizedCrop: takes two thirds of the time of bicubic
  and differs from it by one level of 255 on average over photographs. Crops more than three times too large are first
  reduced by box averages, which is faster.

  Args:
    image: see to_rgb.
    reduce: whether an open JPEG file is decoded at 1/2, 1/4 or 1/8 if the crop keeps `size` pixels per side: about the
      same pixels in less time.
  """
  image = _open(image) if reduce else to_rgb(image)
  image, box = _decode(image, random_box(*_upright_size(image), rng, min_area), size)
  return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0))


def flip(image: np.ndarray) -> np.ndarray:
  """Mirrors [h, w, c] from left to right."""
  return image[:, ::-1]


def name_images(paths: Any) -> list[tuple[str, str]]:
  """Returns (path, name) of each image in a folder, a file, or a list of files and folders.

  A name is the path relative to the folder, or the path as given.

  Raises:
    FileNotFoundError, ValueError: a path does not exist, a folder has no images, or no path is given.
  """
  if isinstance(paths, (str, os.PathLike)):
    paths = [paths]
  named = []
  for path in map(os.fspath, paths):
    if os.path.isdir(path):
      named += [(p, os.path.relpath(p, path)) for p in listing.list_images(path)]
    elif os.path.exists(path):
      named.append((path, path))
    else:
      raise FileNotFoundError(f"the image {files.printable(path)} does not exist")
  if not named:
    raise ValueError("no image was given: name files or a folder")
  return named


def load_image(path: str, size: int) -> np.ndarray:
  """Returns the centre crop, uint8 [size, size, 3], of an image file; ValueError if it cannot be read."""
  try:
    files.check_regular(path)
    return center_crop(path, size)
  except DECODE_ERRORS as error:
    raise ValueError(f"the image {files.printable(path)} cannot be read: {first_line(error)}") from error


def load_images(paths: Any, size: int) -> tuple[np.ndarray, list[str]]:
  """Returns the centre crops, uint8 [n, size, size, 3], and the names of the images of name_images.

  Raises:
    FileNotFoundError, ValueError: see name_images; or a file cannot be read.
  """
  named = name_images(paths)
  images = np.zeros((len(named), size, size, 3), np.uint8)
  for image, (path, _) in zip(images, named):
    image[:] = load_image(path, size)
  return images, [name for _, name in named]
