"""Converts stored images of any mode to uint8 RGB arrays of one size."""

from collections.abc import Callable, Iterator
import concurrent.futures
import io
import math
import os
from typing import Any

import numpy as np
from PIL import Image, ImageCms, JpegImagePlugin

from flextok_jax.core import files, unreadable
from flextok_jax.core.errors import warn_once
from flextok_jax.data import listing
from flextok_jax.data.pictures import UnreadablePicture, decoding, open_picture, orientation

RESIZES = ("crop", "fit", "none")  # see to_size
Size = int | tuple[int, int]  # pixels per side of a square, or height and width
MAX_ASPECT = 64  # longer strips are cut to this aspect ratio before they are resized, to bound memory
REDUCTIONS = (8, 4, 2)  # libjpeg can decode at 1 / these sizes, which is faster
# EXIF orientations with swapped sides; with the end of a stored row or column on the left; and with it at the top.
_TURNED, _FROM_RIGHT, _FROM_BELOW = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_BLOCK = 2**22  # pixels that are converted at a time, to bound memory


def to_rgb(image: Any) -> Image.Image:
  """Returns a Pillow RGB image of a Pillow image, a path, an open file, or an array [h, w] or [h, w, 1, 3 or 4].

  The EXIF orientation is applied; transparent images are composited on white; Pillow converts CMYK, palette and grey.
  Grey images of 16 bits are scaled by 1/257; those of 32 bits and of floating point by the range that holds their
  values (see _range). Arrays are uint8, uint16, bool, or floating point in [0, 1].

  Raises:
    UnreadablePicture: the image cannot be decoded, or has no pixels.
    ValueError: an array of another shape, type or range.
  """
  if isinstance(image, (str, os.PathLike, io.IOBase)):
    image = open_picture(image)
  elif not isinstance(image, Image.Image):
    image = _from_array(np.asarray(image))
  with decoding():
    if 0 in image.size:
      raise UnreadablePicture(f"it has no pixels: {image.width}x{image.height} px")
    image.load()
    turn = orientation(image)
    if turn != 1:
      image = image.transpose(_TURNS[turn])
      for name in ("orientation", "exif", "xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)
    if image.mode[0] in "IF":
      low, high = _range(image)
      image = _by_blocks(image, "L", lambda part: Image.fromarray(_to_8_bits(np.asarray(part), low, high)))
    elif image.mode == "LAB":
      profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
      image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB")) or image
    if image.mode == "La":
      image = image.convert("LA")
    if image.has_transparency_data:
      return _by_blocks(image, "RGB", _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _by_blocks(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
  """Returns an image of another mode, converted in blocks of whole rows."""
  converted = Image.new(mode, image.size)
  rows = max(_BLOCK // image.width, 1)
  for top in range(0, image.height, rows):
    box = (0, top, image.width, min(top + rows, image.height))
    converted.paste(convert(image.crop(box)), box)
  return converted


def _on_white(image: Image.Image) -> Image.Image:
  image = image.convert("RGBA")
  return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _range(image: Image.Image) -> tuple[float, float]:
  """Returns the values of black and white of a grey image of more than 8 bits.

  0 and 65535 for 16 bits. Else 0 and the first of 1 (floating point only), 255 (likewise) and 65535 that holds all
  values, where a tenth more on either side is an overshoot of resampling; else the smallest and the largest value.
  Values that are not finite do not count.
  """
  if image.mode.startswith("I;16"):
    return 0.0, 65535.0
  low, high = np.inf, -np.inf
  rows = max(_BLOCK // image.width, 1)
  for top in range(0, image.height, rows):
    values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
    if len(values := values[np.isfinite(values)]):
      low, high = min(low, float(values.min())), max(high, float(values.max()))
  for white in (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,):
    if low >= -0.1 * high and high <= 1.1 * white:
      return 0.0, white
  return (low, high) if low < high else (0.0, 1.0)


def _to_8_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
  """Scales values from [low, high] to uint8; others are clipped, and NaN is 0."""
  scaled = (np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low) - low) / ((high - low) / 255.0)
  return (np.clip(scaled, 0.0, 255.0) + 0.5).astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
  if array.ndim == 3 and array.shape[2] == 1:
    array = array[:, :, 0]
  if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
    raise ValueError(f"an image array must have shape [h, w] or [h, w, 1, 3 or 4], got {list(array.shape)}")
  if array.dtype == bool:
    array = array.astype(np.uint8) * 255
  elif array.dtype == np.uint16:
    array = _to_8_bits(array, 0.0, 65535.0)
  elif np.issubdtype(array.dtype, np.floating):
    if np.nanmin(array, initial=0.0) < -0.1 or np.nanmax(array, initial=0.0) > 1.1:  # resampling overshoots
      raise ValueError(f"a float image array must lie in [0, 1], got {np.nanmin(array):g} to {np.nanmax(array):g}")
    array = _to_8_bits(array, 0.0, 1.0)
  elif array.dtype != np.uint8:
    raise ValueError(f"an image array must be uint8, uint16, bool or floating point, got {array.dtype}")
  return Image.fromarray(np.ascontiguousarray(array))


def _open(image: Any) -> Image.Image:
  """Returns a Pillow image that is not decoded yet for an open JPEG file, and to_rgb for anything else."""
  if isinstance(image, io.IOBase):
    image = open_picture(image)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
      return image
  return to_rgb(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
  """Returns (width, height) of to_rgb(image)."""
  return image.size[::-1] if orientation(image) in _TURNED else image.size


def sides(size: Size) -> tuple[int, int]:
  """Returns the height and width of a size."""
  return (size, size) if isinstance(size, int) else size


def _decode(
  image: Image.Image, box: tuple[float, ...], shape: tuple[int, int]
) -> tuple[Image.Image, tuple[float, ...]]:
  """Decodes an image from _open, a JPEG at 1/8, 1/4 or 1/2 if its region `box` keeps the pixels of a (height, width).

  Returns:
    (RGB image, box in its pixels), where a box is (left, top, right, bottom).
  """
  width, height = _upright_size(image)
  turn = orientation(image)
  found = box[3] - box[1], box[2] - box[0]
  factor = next((f for f in REDUCTIONS if all(side >= f * least for side, least in zip(found, shape))), 1)
  # draft returns None, and has no effect, if the image is decoded already or no JPEG.
  with decoding():
    if factor == 1 or image.draft(None, (image.width // factor, image.height // factor)) is None:
      return to_rgb(image), box
  image = to_rgb(image)
  # A pixel covers factor x factor stored pixels; in the last column and row fewer, if factor does not divide the sides.
  # What is missing shifts the other pixels if the orientation puts that column on the left, or that row on top.
  left = image.width - width / factor if turn in _FROM_RIGHT else 0
  top = image.height - height / factor if turn in _FROM_BELOW else 0
  return image, tuple(edge / factor + shift for edge, shift in zip(box, (left, top, left, top)))


def center_crop(image: Any, size: Size, reduce: bool = False) -> np.ndarray:
  """Resizes an image, bilinear and antialiased, so that it covers the size, and crops the centre: uint8 [h, w, 3].

  For a square of `size`, the shorter side becomes `size`: bit-identical to torchvision's Resize(size) and
  CenterCrop(size) of a Pillow image, the preprocessing of the reference; but strips longer than MAX_ASPECT times their
  width lose their ends first.

  Args:
    image: see to_rgb.
    size: of the result.
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
  rows, columns = sides(size)
  image, box = _decode(image, (0, 0, width, height), (rows, columns))
  if width * rows >= height * columns:
    width, height = rows * width // height, rows
  else:
    width, height = columns, columns * height // width
  if (width, height) != image.size:
    image = image.resize((width, height), Image.Resampling.BILINEAR, box)
  left, top = round((width - columns) / 2.0), round((height - rows) / 2.0)  # halves to even, like torchvision
  return np.asarray(image)[top : top + rows, left : left + columns].copy()


def fit_size(height: int, width: int, area: int, multiple: int) -> tuple[int, int]:
  """Returns a height and a width that are multiples of `multiple`, at about the aspect ratio and about this area.

  A side has at least one multiple; the other then has the multiples that the area leaves it at most.
  """
  most = max(area // multiple**2, 1)
  ratios = height / width, width / height
  tall, wide = (min(max(round(math.sqrt(area * ratio) / multiple), 1), most) * multiple for ratio in ratios)
  return tall, wide


def size_of(image: Any, resize: str, size: int, multiple: int) -> tuple[int, int]:
  """Returns the height and width of to_size of an image, whose pixels are not decoded if it is a path."""
  if resize == "crop":
    return size, size
  image = open_picture(image) if isinstance(image, str | os.PathLike | io.IOBase) else to_rgb(image)
  width, height = _upright_size(image)
  return fit_size(height, width, size**2, multiple) if resize == "fit" else (height, width)


def to_size(image: Any, resize: str, size: int, multiple: int) -> np.ndarray:
  """Returns an image as uint8 [h, w, 3].

  Args:
    image: see to_rgb.
    resize: "crop": center_crop of `size`; "fit": the whole image, bilinear and antialiased, at the fit_size of the area
      size x size; "none": as it is.
    size: pixels.
    multiple: divisor of the sides of "fit".
  """
  if resize == "crop":
    return center_crop(image, size)
  image = to_rgb(image)
  height, width = size_of(image, resize, size, multiple)
  image = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
  return np.asarray(image).copy()


def random_box(
  width: int, height: int, rng: np.random.Generator, min_area: float, aspect: float = 1.0
) -> tuple[int, int, int, int]:
  """Draws (left, top, right, bottom) with a share min_area to 1 of the area and 3/4 to 4/3 times an aspect ratio.

  Returns the largest centre box of the aspect ratio (width / height) if ten draws do not fit.
  """
  for _ in range(10):
    area = width * height * rng.uniform(min_area, 1.0)
    ratio = aspect * np.exp(rng.uniform(np.log(3.0 / 4.0), np.log(4.0 / 3.0)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      break
  else:
    w, h = max(min(width, round(height * aspect)), 1), max(min(height, round(width / aspect)), 1)
    left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_resized_crop(
  image: Any, size: Size, rng: np.random.Generator, min_area: float, reduce: bool = False
) -> np.ndarray:
  """Returns the region of random_box, resized to uint8 [h, w, 3], whose aspect ratio is that of the size.

  Antialiased bilinear, like center_crop and torchvision's RandomResizedCrop: takes two thirds of the time of bicubic
  and differs from it by one level of 255 on average over photographs. Crops more than three times too large are first
  reduced by box averages, which is faster.

  Args:
    image: see to_rgb.
    size: of the result.
    rng: draws the region.
    min_area: see random_box.
    reduce: whether an open JPEG file is decoded at 1/2, 1/4 or 1/8 if the crop keeps the pixels of `size`: about the
      same pixels in less time.
  """
  image = _open(image) if reduce else to_rgb(image)
  rows, columns = sides(size)
  box = random_box(*_upright_size(image), rng, min_area, columns / rows)
  image, region = _decode(image, box, (rows, columns))
  return np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR, box=region, reducing_gap=3.0))


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


def load_image(path: str, size: int, resize: str = "crop", multiple: int = 1) -> np.ndarray:
  """Returns an image file as uint8 [h, w, 3], see to_size; ValueError if it cannot be read."""
  try:
    return to_size(path, resize, size, multiple)
  except UnreadablePicture as error:
    raise ValueError(f"the image {files.printable(path)} cannot be read: {error}") from error


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


def folder_batches(
  folder: str, size: int, num_images: int, batch_size: int, max_unreadable: float
) -> Iterator[np.ndarray]:
  """Yields the centre crops of the pictures under a folder, uint8 [b, size, size, 3], of at most batch_size.

  Unreadable pictures are left out, named, and counted in a warning.

  Args:
    num_images: pictures at most, from all parts of the folder: a fixed random choice.
    max_unreadable: share of unreadable pictures above which reading stops.

  Raises:
    FileNotFoundError, ValueError: no folder, no picture, or too many that cannot be read (core/unreadable.py).
  """
  paths = listing.list_images(folder)
  if num_images < len(paths):
    paths = [paths[i] for i in np.sort(np.random.default_rng(0).permutation(len(paths))[:num_images])]
  what, reasons = f"{len(paths)} pictures of {files.printable(folder)}", []

  def read(path: str) -> np.ndarray | str:
    try:
      return load_image(path, size)
    except ValueError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(paths), batch_size):
      found = list(pool.map(read, paths[start : start + batch_size]))
      for reason in (x for x in found if isinstance(x, str)):
        unreadable.skip(reason, key=reason)
        reasons.append(reason)
        unreadable.check(len(reasons), len(paths), max_unreadable, what=what, example=reasons[0])
      images = [x for x in found if not isinstance(x, str)]
      if images:
        yield np.stack(images)
  if len(reasons) == len(paths):
    raise ValueError(f"none of {what} can be read: {reasons[0]}")
  if reasons:
    warn_once(f"{len(reasons)} of {what} are left out, such as: {reasons[0]}")
