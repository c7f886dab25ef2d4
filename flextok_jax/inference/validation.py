"""Checks of arguments. With conditions.py, it is the only place in this package that looks at the values of arrays.

Under a transformation of jax (jit, grad, vmap) an array has a shape and a type, but no values yet; then only those are
checked. Every check raises a ValueError that names the argument, its value and what it must be.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import numbers
import operator
import os
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flextok_jax.config.ranges import MAX_SIDE, SCALES
from flextok_jax.core.errors import quote, warn_once
from flextok_jax.data import transforms
from flextok_jax.models.tokenizer.flextok import Sampler

Array = jax.Array | np.ndarray
Images = jax.Array | np.ndarray | Sequence[Image.Image | str | os.PathLike]
TokenIds = jax.Array | np.ndarray | Sequence[Sequence[int] | np.ndarray]
Scale = float | Callable[[float], float] | jax.Array


def is_traced(x: Any) -> bool:
  """Whether x is an array without values, inside a transformation of jax."""
  return isinstance(x, jax.core.Tracer)


def namespace(x: Any) -> ModuleType:
  """Returns jax.numpy while x is traced, else numpy, which compiles nothing."""
  return jnp if is_traced(x) else np


# Kinds of values.


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
  """Returns a whole number from low to high, of Python, numpy or jax."""
  try:
    found = None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    found = None
  if found is None or found < low or (high is not None and found > high):
    wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise ValueError(f"{name}={quote(value)} must be a whole number {wanted}")
  return found


def at_least_one(name: str, value: Any) -> int:
  """Returns a whole number of at least 1."""
  return whole_number(name, value, 1)


def batch_size(value: Any) -> int | None:
  """Returns a number of rows per batch, or None for all."""
  return None if value is None else at_least_one("batch_size", value)


def seed(value: Any) -> int:
  """Returns a seed, which fits 32 bits."""
  return whole_number("seed", value, 0, 2**32 - 1)


def number(name: str, value: Any, low: float, high: float, remedy: str = "") -> float:
  """Returns a number from low to high, of Python, numpy or jax; NaN is none."""
  known = isinstance(value, numbers.Real | np.generic | np.ndarray | jax.Array) and not is_traced(value)
  if not known or np.ndim(value) or not _is_real(np.asarray(value).dtype) or not low <= value <= high:
    raise ValueError(f"{name}={quote(value)} must be a number from {low:g} to {high:g}{remedy}")
  return float(value)


def flag(name: str, value: Any) -> bool:
  """Returns True or False."""
  if not isinstance(value, bool | np.bool_):
    raise ValueError(f"{name}={quote(value)} must be True or False")
  return bool(value)


def progress(value: Any) -> bool | None:
  """Returns True (a bar), False, or None (a bar on a terminal, elsewhere lines)."""
  return None if value is None else flag("progress", value)


def path(name: str, value: Any) -> str:
  """Returns a path or the name of a repository as text."""
  if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
    raise ValueError(f"{name}={quote(value)} must be a path")
  return os.fspath(value)


def array(name: str, value: Any) -> Array:
  """Returns numbers or bools as a numpy array, or an array itself while it is traced."""
  if is_traced(value):
    return value
  try:
    found = np.asarray(value)
  except (ValueError, TypeError):  # rows of different lengths, keys, a list of traced arrays
    found = np.asarray(None)
  if found.dtype != bool and not jnp.issubdtype(found.dtype, jnp.number):
    raise ValueError(f"{name}={quote(value)} must be an array of numbers")
  return found


def floats(name: str, value: Any) -> Array:
  """Returns finite numbers as an array of float32, or of a shorter type of their own. Arrays on a device stay there."""
  x = value if isinstance(value, jax.Array) else array(name, value)
  if not _is_real(x.dtype):
    raise ValueError(f"{name} must be an array of numbers, got {x.dtype}")
  if not is_traced(x) and x.size and not np.isfinite(extent(x)).all():
    raise ValueError(f"{name} must be finite, but holds NaN or infinite values")
  return x if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4 else x.astype(np.float32)


def extent(x: Array) -> tuple[float, float]:
  """Returns the smallest and the largest value of an array with values; both are NaN if any value is."""
  if isinstance(x, np.ndarray) or all(device.platform == "cpu" for device in x.devices()):
    x = np.asarray(x)  # compiles nothing
    x = x if x.dtype.itemsize > 2 else x.astype(np.float32)
  return float(x.min()), float(x.max())


def _is_real(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


# Keys and values of samples.


def keys(key: Any, batch: int) -> jax.Array:
  """Returns one key per sample [b]: fold_in(key, i) of one key, or the keys that are given.

  Args:
    key: one key or [b] keys, of jax.random.key or PRNGKey.
    batch: number of samples.
  """
  key = typed_keys(key)
  if not key.ndim:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(batch, dtype=np.uint32))
  if len(key) != batch:
    raise ValueError(f"key must be one key, or one for each of {batch} samples, got {len(key)}")
  return key


def one_key(key: Any) -> jax.Array:
  """Returns one key as jax.random.key makes it."""
  key = typed_keys(key)
  if key.ndim:
    raise ValueError(f"key must be one key like jax.random.key(seed), got {len(key)} keys")
  return key


def typed_keys(key: Any) -> jax.Array:
  """Returns one key, also of a seed, or one per sample [b] as jax.random.key makes them."""
  found: Any = key if isinstance(key, np.ndarray | jax.Array) else np.asarray(None)
  if isinstance(key, int | np.integer) and not isinstance(key, bool):
    found = jax.random.key(seed(key))
  try:
    if found.dtype == np.uint32:  # of PRNGKey
      found = jax.random.wrap_key_data(found)
  except (TypeError, ValueError):  # not of the shape of keys
    pass
  if not jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
    raise ValueError(f"key must be a key like jax.random.key(seed), or a seed, got {quote(key)}")
  if found.ndim > 1:
    raise ValueError(f"key must be one key, or one per sample [b], got keys of shape {list(found.shape)}")
  return found


def num_samples(given: Mapping[str, int | None]) -> int:
  """Returns the number of samples, by default 1.

  Args:
    given: what arguments say, by their names; None: nothing.
  """
  sizes = {name: size for name, size in given.items() if size is not None}
  if len(set(sizes.values())) > 1:
    raise ValueError(f"how many samples? {', '.join(f'{name} says {size}' for name, size in sizes.items())}")
  batch = next(iter(sizes.values()), 1)
  if batch < 1:
    raise ValueError(f"{next(iter(sizes))} is empty: at least one sample is needed")
  return batch


def per_sample(name: str, value: Any, batch: int, dtype: Any) -> Array:
  """Returns one value, or one per sample, as an array [b] of dtype; values are cast within their kind."""
  found = array(name, value)
  if found.shape not in ((), (batch,)) or not np.can_cast(found.dtype, dtype, "same_kind"):
    raise ValueError(
      f"{name} must be one {np.dtype(dtype).name}, or one for each of {batch} samples, got {quote(value)}"
    )
  return namespace(found).broadcast_to(found.astype(dtype), (batch,))


# Of tokenizers


def token_count(num_tokens: int | None, num_registers: int) -> int:
  """Returns the number of tokens to encode, by default all."""
  return whole_number("num_tokens", num_registers if num_tokens is None else num_tokens, 1, num_registers)


def quality(value: Any) -> float:
  """Returns the largest acceptable distance."""
  known = isinstance(value, numbers.Real | np.generic) and not isinstance(value, bool | np.bool_)
  if not known or not 0 < value < math.inf:
    raise ValueError(f"quality={quote(value)} must be a finite number above 0, the largest acceptable distance")
  return float(value)


def resize(value: Any) -> str:
  """Returns how the pictures of a list come to their sizes."""
  if value not in transforms.RESIZES:
    raise ValueError(f"resize={quote(value)} must be {', '.join(transforms.RESIZES[:-1])} or {transforms.RESIZES[-1]}")
  return value


def image_size(size: Any, multiple: int) -> tuple[int, int]:
  """Returns (height, width) of images, which are multiples of `multiple`."""
  listed = isinstance(size, Sequence | np.ndarray) and not isinstance(size, str)
  if not listed or len(size) != 2:
    raise ValueError(f"size={quote(size)} must be (height, width) in pixels")
  height, width = (whole_number("size", side, 1, MAX_SIDE) for side in size)
  _check_sides(height, width, multiple)
  return height, width


def _check_sides(height: int, width: int, multiple: int, remedy: str = "") -> None:
  if height % multiple or width % multiple:
    raise ValueError(f"images of {height} x {width} pixels: sides must be multiples of {multiple}{remedy}")


def sizes(images: Sequence, resize: str, image_size: int, multiple: int) -> list[tuple[int, int]]:
  """Returns the (height, width) of each picture of a list as `images` reads it; arguments as of transforms.to_size."""
  return [_read(image, transforms.size_of, resize, image_size, multiple) for image in images]


def images(images: Images, image_size: int, multiple: int, resize: str = "crop", fit_multiple: int = 1) -> Array:
  """Returns images as an array uint8 or float [b, h, w, 3].

  Args:
    images: an array, or a list of Pillow images and paths, of one size if they are not cropped.
    image_size: size of the items of a list, in pixels.
    multiple: divisor of the sides.
    resize: how the items of a list come to their size, see transforms.to_size.
    fit_multiple: divisor of the sides for "fit".
  """
  if isinstance(images, str | os.PathLike | Image.Image):
    raise ValueError(f"images must be a list of images or an array, got a {type(images).__name__}: put it in a list")
  if listed := isinstance(images, Sequence):
    if not len(images):
      raise ValueError("images is an empty list")
    images = np.stack([_read(image, transforms.to_size, resize, image_size, fit_multiple) for image in images])
  if not isinstance(images, np.ndarray | jax.Array):
    raise ValueError(f"images must be an array of numpy or jax, or a list of images, got a {type(images).__name__}")
  if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
    raise ValueError(f"images must have shape [b, h, w, 3], got {list(images.shape)}")
  if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f"images must be uint8 or floating point in [-1, 1], got {images.dtype}")
  if images.dtype != np.uint8 and not is_traced(images):
    low, high = extent(images)
    if not -2 < low <= high < 2:  # resampled images may overshoot slightly
      raise ValueError(f"float images must lie in [-1, 1], got {low} to {high}: scale or give uint8")
    if 0 <= low < high <= 1:
      warn_once(
        "float images are taken to lie in [-1, 1], and these lie in [0, 1]: if that is their range, give 2 x - 1"
      )
  height, width = images.shape[1:3]
  _check_sides(height, width, multiple, "; resize='fit' makes them so" if listed else "")
  return images


def _read(image: Any, function: Callable, *args: Any) -> Any:
  if not isinstance(image, str | os.PathLike | Image.Image):
    raise ValueError(f"a list of images holds Pillow images or paths, got a {type(image).__name__}: stack arrays")
  try:
    return function(image, *args)
  except (OSError, ValueError) as e:
    raise ValueError(f"the image {image} cannot be read: {e}") from e


def token_ids(ids: TokenIds, keep_k: Any, num_registers: int, num_codes: int) -> tuple[Array, Array, int]:
  """Returns (ids int32 [b, n], keep_k int32 [b], the largest keep_k, or n while it is traced).

  Args:
    ids: int [b, n], or a list of sequences, which are padded with 0.
    keep_k: number of ids to use, one or one per sample; None: all that are given.
    num_registers: largest n.
    num_codes: ids are 0 to num_codes - 1.
  """
  lengths = None
  if not isinstance(ids, jax.Array | np.ndarray):
    rows = [array("ids", row) for row in ids] if isinstance(ids, Sequence) and not isinstance(ids, str) else []
    if not rows or not all(row.ndim == 1 and (jnp.issubdtype(row.dtype, jnp.integer) or not row.size) for row in rows):
      raise ValueError(f"ids must be an integer array [b, n] or a list of sequences of whole numbers, got {quote(ids)}")
    lengths = np.asarray([len(row) for row in rows], np.int32)
    if lengths.max() <= num_registers:  # else refused below
      ids = np.stack([np.pad(row.astype(np.int64), (0, lengths.max() - len(row))) for row in rows])
    else:
      ids = np.broadcast_to(np.int64(0), (len(rows), lengths.max()))
  if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"ids must be integers [b, n], got {ids.dtype} {list(ids.shape)}")
  batch, width = ids.shape
  lengths = np.full(batch, width, np.int32) if lengths is None else lengths
  if not batch or not lengths.min() >= 1 or width > num_registers:
    raise ValueError(f"a sequence has 1 to {num_registers} ids, got {sorted(set(lengths.tolist()))}")
  ids = array("ids", ids)
  ids_in_range("", ids, num_codes)
  given = lengths if keep_k is None else array("keep_k", keep_k)
  keep_k = per_sample("keep_k", given, batch, jnp.int32)
  if is_traced(keep_k):
    return ids.astype(np.int32), keep_k, width
  wrong = np.broadcast_to((given < 1) | (given > lengths), (batch,))
  if wrong.any():
    i = int(np.argmax(wrong))
    value = np.broadcast_to(given, (batch,))[i]
    raise ValueError(f"keep_k={value} of sample {i} must lie between 1 and its {lengths[i]} ids")
  return ids.astype(np.int32), keep_k, int(keep_k.max())


def fit_slots(ids: Array, slots: int) -> Array:
  """Returns ids [b, n] cut or padded with 0 to [b, slots]."""
  return namespace(ids).pad(ids[:, :slots], ((0, 0), (0, max(slots - ids.shape[1], 0))))


def ids_in_range(where: str, ids: Array, num_ids: int) -> None:
  if not is_traced(ids) and ids.size and not 0 <= ids.min() <= ids.max() < num_ids:
    worst = ids.min() if ids.min() < 0 else ids.max()
    raise ValueError(f"token id {worst}{where} is out of range: ids are 0 to {num_ids - 1}")


def latents(name: str, x: Any, channels: int) -> Array:
  """Returns latents [b, h, w, c], see floats."""
  x = floats(name, x)
  if x.ndim != 4 or x.shape[-1] != channels or 0 in x.shape:
    raise ValueError(f"{name} must have shape [b, h, w, {channels}], got {list(x.shape)}")
  return x


def noised_latents(name: str, x: Any, channels: int, batch: int, patch_size: int) -> Array:
  """Returns latents [b, h, w, c] that the decoder is to cut into patches, see floats."""
  x = latents(name, x, channels)
  count, height, width, _ = x.shape
  if count != batch or height % patch_size or width % patch_size:
    raise ValueError(
      f"{name} must be {batch} latents, one per sequence of ids, with sides that are multiples of {patch_size}; "
      f"got shape {list(x.shape)}"
    )
  return x


def times(t: Any, batch: int) -> Array:
  """Returns times of the flow, in [0, 1], as float32 [b]."""
  t = per_sample("t", t, batch, jnp.float32)
  if not is_traced(t) and not ((t >= 0) & (t <= 1)).all():
    raise ValueError(f"t must lie in [0, 1], got {t}")
  return t


def sampler(own: Sampler, **given: Any) -> Sampler:
  """Returns a checkpoint's sampler with the settings that are given, and are not None, in place of its own.

  Args:
    own: the checkpoint's.
    **given: fields of Sampler; guidance_scale may also be a function of t in (0, 1], which is called once per step, or
      an array [num_steps].
  """
  given = {name: value for name, value in given.items() if value is not None}
  scale: Any = given.pop("guidance_scale", None)
  chosen = dataclasses.replace(own, **given)  # checks the other settings
  if chosen.guidance == "none" and scale is not None:
    raise ValueError(
      f"guidance_scale={quote(scale)} has no effect where guidance is 'none': give guidance=apg or guidance=cfg as well"
    )
  scale, count = own.guidance_scale if scale is None else scale, chosen.num_steps
  value = functools.partial(number, "guidance_scale", low=SCALES[0], high=SCALES[1])
  if callable(scale):
    scale = np.asarray([value(scale(i / count)) for i in range(count, 0, -1)], np.float32)
  elif not is_traced(scale) and np.shape(steps := array("guidance_scale", scale)) == (count,):
    scale = np.asarray([value(step) for step in steps], np.float32)
  elif not is_traced(scale):
    scale = value(scale)
  elif scale.shape not in ((), (count,)):
    raise ValueError(f"guidance_scale must be one number, or one for each of {count} steps, got {list(scale.shape)}")
  return dataclasses.replace(chosen, guidance_scale=scale)
