"""Checks of arguments: the only place in this package that looks at the values of arrays.

Under a transformation of jax (jit, grad, vmap) an array has a shape and a type, but no values yet; then only those are
checked. Every check raises a ValueError that names the argument, its value and what it must be.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import os
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flextok_jax.data import transforms
from flextok_jax.models.tokenizer.flextok import Sampler

Array = jax.Array | np.ndarray
Images = jax.Array | np.ndarray | Sequence[Image.Image | str | os.PathLike]
TokenIds = jax.Array | np.ndarray | Sequence[Sequence[int] | np.ndarray]
Scale = float | Callable[[float], float] | jax.Array


def is_traced(x: Any) -> bool:
  """Whether x is an array without values, inside a transformation of jax."""
  return isinstance(x, jax.core.Tracer)


def as_array(x: Any) -> Array:
  """Returns x as a numpy array, or x itself while it is traced."""
  return x if is_traced(x) else np.asarray(x)


def namespace(x: Any) -> ModuleType:
  """Returns jax.numpy while x is traced, else numpy, which compiles nothing."""
  return jnp if is_traced(x) else np


def whole_number(name: str, value: Any, low: int, high: int) -> int:
  """Returns a whole number from low to high."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
    raise ValueError(f"{name}={value!r} must be a whole number from {low} to {high}")
  return int(value)


def at_least_one(name: str, value: Any) -> None:
  """Raises ValueError for anything but a whole number of at least 1."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
    raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def seed(value: int) -> None:
  """Raises ValueError for a seed that does not fit 32 bits."""
  if not 0 <= value < 2**32:
    raise ValueError(f"seed={value} is out of range: 0 to {2**32 - 1}")


def keys(key: Any, batch: int) -> jax.Array:
  """Returns one key per sample [b]: fold_in(key, i) of one key, or the keys that are given.

  Args:
    key: one key or [b] keys, of jax.random.key or PRNGKey.
    batch: number of samples.
  """
  key = typed_keys(key)
  if not key.ndim:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
  if len(key) != batch:
    raise ValueError(f"key must be one key, or one for each of {batch} samples, got {len(key)}")
  return key


def typed_keys(key: Any) -> jax.Array:
  """Returns one key or one per sample [b] as jax.random.key makes them."""
  dtype, ndim = getattr(key, "dtype", None), np.ndim(key)
  if dtype == np.uint32 and np.shape(key)[-1:] == (2,):  # of PRNGKey
    key, ndim = jax.random.wrap_key_data(key), ndim - 1
  elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise ValueError(f"key must be a key like jax.random.key(seed), got {key!r}")
  if ndim > 1:
    raise ValueError(f"key must be one key, or one per sample [b], got keys of shape {list(key.shape)}")
  return key


def per_sample(name: str, value: Any, batch: int, dtype: Any) -> Array:
  """Returns one value, or one per sample, as an array [b] of dtype."""
  array = as_array(value)
  if array.shape not in ((), (batch,)) or not np.can_cast(array.dtype, dtype, "same_kind"):
    raise ValueError(f"{name} must be one {np.dtype(dtype).name}, or one for each of {batch} samples, got {value!r}")
  return namespace(array).broadcast_to(array.astype(dtype), (batch,))


# Of tokenizers


def token_count(num_tokens: int | None, num_registers: int) -> int:
  """Returns the number of tokens to encode, by default all."""
  return whole_number("num_tokens", num_registers if num_tokens is None else num_tokens, 1, num_registers)


def images(images: Images, image_size: int, multiple: int) -> Array:
  """Returns images as an array uint8 or float [b, h, w, 3].

  Args:
    images: an array, or a list of Pillow images and paths.
    image_size: size that the items of a list are cropped to, in pixels.
    multiple: divisor of the sides.
  """
  if isinstance(images, str | os.PathLike | Image.Image):
    raise ValueError(f"images must be a list of images or an array, got a {type(images).__name__}: put it in a list")
  if isinstance(images, Sequence):
    if not len(images):
      raise ValueError("images is an empty list")
    return np.stack([_crop(image, image_size) for image in images])
  if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
    raise ValueError(f"images must have shape [b, h, w, 3], got {list(images.shape)}")
  if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f"images must be uint8 or floating point in [-1, 1], got {images.dtype}")
  # Resampled images may overshoot slightly; NaN is refused too. Arrays on a device are not fetched for this.
  if isinstance(images, np.ndarray) and images.dtype != np.uint8 and not np.abs(images).max() < 2:
    raise ValueError(f"float images must lie in [-1, 1], got {images.min()} to {images.max()}: scale or give uint8")
  height, width = images.shape[1:3]
  if height % multiple or width % multiple:
    raise ValueError(f"images of {height} x {width} pixels: sides must be multiples of {multiple}")
  return images


def _crop(image: Image.Image | str | os.PathLike, image_size: int) -> np.ndarray:
  if not isinstance(image, str | os.PathLike | Image.Image):
    raise ValueError(f"a list of images holds Pillow images or paths, got a {type(image).__name__}: stack arrays")
  try:
    return transforms.center_crop(image, image_size)
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
    rows = [np.asarray(row) for row in ids]
    if not rows or not all(row.ndim == 1 and (np.issubdtype(row.dtype, np.integer) or not row.size) for row in rows):
      raise ValueError("ids must be an integer array [b, n] or a list of sequences of whole numbers")
    lengths = np.asarray([len(row) for row in rows], np.int32)
    ids = np.stack([np.pad(row.astype(np.int64), (0, lengths.max() - len(row))) for row in rows])
  if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"ids must be integers [b, n], got {ids.dtype} {list(ids.shape)}")
  batch, width = ids.shape
  lengths = np.full(batch, width, np.int32) if lengths is None else lengths
  if not batch or not lengths.min() >= 1 or width > num_registers:
    raise ValueError(f"a sequence has 1 to {num_registers} ids, got {sorted(set(lengths.tolist()))}")
  ids = as_array(ids)
  _ids_in_range("", ids, num_codes)
  keep_k = per_sample("keep_k", lengths if keep_k is None else keep_k, batch, jnp.int32)
  if is_traced(keep_k):
    return ids.astype(np.int32), keep_k, width
  wrong = (keep_k < 1) | (keep_k > lengths)
  if wrong.any():
    i = int(np.argmax(wrong))
    raise ValueError(f"keep_k={int(keep_k[i])} of sample {i} must lie between 1 and its {lengths[i]} ids")
  return ids.astype(np.int32), keep_k, int(keep_k.max())


def fit_slots(ids: Array, slots: int) -> Array:
  """Returns ids [b, n] cut or padded with 0 to [b, slots]."""
  return namespace(ids).pad(ids[:, :slots], ((0, 0), (0, max(slots - ids.shape[1], 0))))


def _ids_in_range(where: str, ids: Array, num_ids: int) -> None:
  if not is_traced(ids) and ids.size and not 0 <= ids.min() <= ids.max() < num_ids:
    worst = ids.min() if ids.min() < 0 else ids.max()
    raise ValueError(f"token id {worst}{where} is out of range: ids are 0 to {num_ids - 1}")


def latents(name: str, x: Array, channels: int) -> None:
  """Checks latents [b, h, w, c]."""
  if len(np.shape(x)) != 4 or np.shape(x)[-1] != channels:
    raise ValueError(f"{name} must have shape [b, h, w, {channels}], got {list(np.shape(x))}")


def noised_latents(name: str, x: Array, channels: int, batch: int, patch_size: int) -> None:
  """Checks latents [b, h, w, c] that the decoder is to cut into patches."""
  latents(name, x, channels)
  count, height, width, _ = np.shape(x)
  if count != batch or height % patch_size or width % patch_size:
    raise ValueError(
      f"{name} must be {batch} latents, one per sequence of ids, with sides that are multiples of {patch_size}; "
      f"got shape {list(np.shape(x))}"
    )


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
  settings = {field: getattr(own, field) for field in Sampler.__dataclass_fields__}
  settings |= {name: value for name, value in given.items() if value is not None}
  scale = settings["guidance_scale"]
  chosen = Sampler(**(settings | {"guidance_scale": own.guidance_scale}))  # checks the other settings
  if chosen.guidance == "none" and given.get("guidance_scale") is not None:
    raise ValueError(
      f"guidance_scale={scale} has no effect where guidance is 'none': give guidance=apg or guidance=cfg as well"
    )
  count = chosen.num_steps
  if callable(scale):
    scale = np.asarray([scale(i / count) for i in range(count, 0, -1)], np.float32)
  if not is_traced(scale) and (np.shape(scale) not in ((), (count,)) or not np.isfinite(scale).all()):
    raise ValueError(f"guidance_scale={scale!r} must be a finite number or a function of t that returns one")
  return Sampler(**(settings | {"guidance_scale": scale}))


# Of generators


def generator_ids(name: str, ids: Any, num_tokens: int, num_ids: int) -> Array:
  """Returns ids [b, n] as int32."""
  ids = as_array(ids)
  if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape[1] > num_tokens:
    raise ValueError(
      f"{name} must be integers [b, n] with n of at most {num_tokens}, got {ids.dtype} {list(ids.shape)}"
    )
  _ids_in_range(f" in {name}", ids, num_ids)
  return ids.astype(np.int32)


def prefix(ids: Any, batch: int, num_tokens: int, most: int, num_ids: int) -> Array:
  """Returns the first tokens of samples as int32 [b, p], p < num_tokens; None: p = 0. One row serves all samples."""
  if ids is None:
    return np.zeros((batch, 0), np.int32)
  ids = generator_ids("prefix", ids, most, num_ids)
  if ids.shape[1] >= num_tokens:
    raise ValueError(f"a prefix of {ids.shape[1]} tokens leaves nothing to draw of num_tokens={num_tokens}")
  return namespace(ids).broadcast_to(ids, (batch, ids.shape[1]))


def labels(classes: Any, batch: int, num_classes: int) -> Array:
  """Returns classes as int32 [b]; None: -1, no class."""
  if classes is None:
    return np.full(batch, -1, np.int32)
  classes = as_array(classes)
  if classes.shape not in ((), (batch,)) or not jnp.issubdtype(classes.dtype, jnp.integer):
    raise ValueError(f"labels must be whole numbers, one for each of {batch} samples, got {classes!r}")
  if not is_traced(classes) and not -1 <= classes.min() <= classes.max() < num_classes:
    worst = classes.min() if classes.min() < -1 else classes.max()
    raise ValueError(f"class {worst} is out of range: classes are 0 to {num_classes - 1}, -1 for none")
  return namespace(classes).broadcast_to(classes.astype(np.int32), (batch,))


def prompts(texts: Any, allow_empty: bool = True) -> None:
  """Checks a list of texts."""
  if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
    raise ValueError(f"prompts must be a list of texts, got {texts!r}")
  for i, text in enumerate(texts):
    if not allow_empty and not text.strip():
      raise ValueError(f"prompt {i} is empty: say what to draw, or leave prompts out to draw without condition")


def text(features: Any, lengths: Any, batch: int, width: int) -> tuple[Array, Array]:
  """Returns (text features [b, t, f], int32 [b]: how many of the t positions count, by default all)."""
  features = features if is_traced(features) else jnp.asarray(features)
  if features.ndim != 3 or features.shape[0] != batch or not features.shape[1] or features.shape[2] != width:
    raise ValueError(f"text_embeddings must have shape [{batch}, t, {width}], got {list(features.shape)}")
  size = features.shape[1]
  lengths = np.full(batch, size, np.int32) if lengths is None else as_array(lengths)
  if not is_traced(lengths):
    whole = np.issubdtype(lengths.dtype, np.integer) and lengths.shape == (batch,)
    if not whole or not 1 <= lengths.min() <= lengths.max() <= size:
      raise ValueError(f"text_lengths must be {batch} whole numbers from 1 to {size}, got {lengths!r}")
  return features, lengths.astype(np.int32)


def null_text(features: Any, lengths: Any, batch: int, width: int) -> tuple[Array, Array]:
  """As text, of the empty text: one for all samples, or one per sample."""
  shape = np.shape(features)
  if len(shape) != 3 or shape[0] not in (1, batch):
    raise ValueError(f"null_text_embeddings must have shape [1 or {batch}, t, {width}], got {list(shape)}")
  return text(features, lengths, shape[0], width)


def choices(guidance_scale: float, temperature: float, top_k: int, top_p: float, num_ids: int) -> None:
  """Checks how tokens are chosen."""
  if not math.isfinite(guidance_scale):
    raise ValueError(f"guidance_scale={guidance_scale!r} must be a finite number")
  if not 0 < temperature < math.inf:
    raise ValueError(f"temperature={temperature!r} must be above 0; greedy=True takes the most likely token")
  if not isinstance(top_k, int | np.integer) or not 0 <= top_k <= num_ids:
    raise ValueError(f"top_k={top_k!r} must be a whole number from 0 (off) to {num_ids}")
  if not 0 <= top_p <= 1:
    raise ValueError(f"top_p={top_p!r} must lie in (0, 1], or be 0 for off")


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
