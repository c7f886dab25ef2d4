"""The tokenizer to call: flextok_jax.load(...) and the FlexTok that it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict
import numpy as np
from PIL import Image

from flextok_jax.data import transforms
from flextok_jax.inference import adaptive
from flextok_jax.models.tokenizer import flextok
from flextok_jax.ops import distances, fsq, nested
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.stages.vae import make_vae
from flextok_jax.weights import loading, saving

Images = jax.Array | np.ndarray | Sequence[Image.Image | str | os.PathLike]
TokenIds = jax.Array | np.ndarray | Sequence[Sequence[int]]


def load(
  source: str | os.PathLike,
  dtype: str | None = None,
  *,
  vae_norm_num_groups: int = 32,
  mup_base_width: int | None = None,
  image_size: int | None = None,
  mesh: Mesh | None = None,
) -> FlexTok:
  """Loads a tokenizer (or a VAE alone, which only encodes and decodes latents).

  Args:
    source: a repository of the Hugging Face hub ("EPFL-VILAB/flextok_d18_d28_dfn"), an official .safetensors file or
      folder, a folder of diffusers' AutoencoderKL, or a workdir, folder or weights file of ours.
    dtype: type in which it computes and keeps its parameters, "float32" or "bfloat16"; default: that of the config, for
      official checkpoints float32. The VAE has its own (in official ones float32).
    vae_norm_num_groups: groups of the VAE's GroupNorms: official files do not tell (the released ones: 32).
    mup_base_width: base width of an official model whose configuration says use_mup_readout, which it does not tell.
    image_size: pixels a side, in place of the checkpoint's own (official ones: 256, which their files do not tell).
    mesh: devices to place the parameters on, by their logical axes; default: the first device.

  Raises:
    FileNotFoundError: nothing there, or it cannot be downloaded; the message says what to put where.
    ValueError: a damaged, foreign or unsupported checkpoint; the message names what is wrong.
  """
  config, params = loading.load(
    source,
    param_dtype=None,
    dtype=dtype,
    vae_norm_num_groups=vae_norm_num_groups,
    mup_base_width=mup_base_width,
    image_size=image_size,
    mesh=mesh,
  )
  return FlexTok(params, FrozenConfigDict(config))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class FlexTok:
  """A tokenizer: parameters and the config that says what they are (arXiv 2502.13967).

  A pytree (the config is static): it can be passed through jax.jit, where all methods work, but tokenize by quality.
  Outside, each is compiled once per shape of its arguments, and bad arguments raise a ValueError that names them.
  """

  params: Any
  config: FrozenConfigDict

  @property
  def image_size(self) -> int:
    """Pixels a side of the images that it was made for."""
    return self.config.image_size

  @property
  def num_registers(self) -> int:
    """Tokens an image at most."""
    return self._tokenizer_config().tokens.num_registers

  @property
  def num_codes(self) -> int:
    """Size of the vocabulary: token ids are 0 to num_codes - 1."""
    return fsq.num_codes(self._tokenizer_config().tokens.levels)

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, c) of the latents of an image of image_size."""
    return _network(self.config).latent_shape(self.image_size)

  def tokenize(
    self,
    images: Images,
    num_tokens: int | None = None,
    key: jax.Array | None = None,
    quality: float | None = None,
    metric: str | distances.Distance = "mse",
    noise: jax.Array | None = None,
    num_steps: int = 25,
    guidance: str | None = "apg",
    guidance_scale: float | Callable[[float], float] = 7.5,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
  ) -> jax.Array | list[np.ndarray]:
    """Turns images into token ids: equally many for each, or, given a quality, the fewest that suffice for it.

    These are found by comparing the image with what its prefixes decode to, clipped (see adaptive.shortest_prefix).

    Args:
      images: [b, h, w, 3], uint8 or float in [-1, 1]; or a list of Pillow images or paths, which are turned to RGB
        (transparency on white), resized to image_size on the shorter side (bilinear) and cropped to the centre.
      num_tokens: how many of the first tokens; default: all. Fewer take less time.
      key: to sample the VAE's posterior; default: its mode.
      quality: largest distance of a reconstruction that is good enough. What follows matters with it alone.
      metric: the distance: "mse" (of pixels in [-1, 1]), "perceptual" (see ops/distances.py), or a function of two
        batches [b, h, w, 3] in [-1, 1] that jax can trace and that returns one number an image.
      noise: as for detokenize; default: the same for every image, whose length then depends on nothing but itself.
      num_steps, guidance, guidance_scale, guidance_interval: as for detokenize.

    Returns:
      int32 [b, num_tokens]; with a quality a list of b arrays int32 [1 to num_tokens], which detokenize takes.
    """
    total = self.num_registers
    num_tokens = total if num_tokens is None else num_tokens
    if not isinstance(num_tokens, int) or not 1 <= num_tokens <= total:
      raise ValueError(f"num_tokens={num_tokens!r} must be a whole number from 1 to {total}")
    images = self._images(images)
    tokenize = lambda: _tokenize(self, images, self._length(num_tokens - 1), key)[:, :num_tokens]
    if quality is None:
      return tokenize()
    adaptive.check_quality(quality)
    sampler = self._sampler(num_steps, guidance, guidance_scale, guidance_interval)
    metric = distances.resolve(metric)
    if noise is None:
      side, (batch, height, width, _) = _network(self.config).downscale, images.shape
      shape = (batch, height // side, width // side, self.latent_shape[-1])
      noise = jnp.broadcast_to(adaptive.shared_noise(0, shape[1:]), shape)
    self._check_noised("noise", noise, len(images))
    ids = tokenize()
    if isinstance(ids, jax.core.Tracer):
      raise ValueError("sequences of different lengths do not come out of jax.jit: call tokenize(quality=...) outside")
    lengths = np.asarray(_lengths(self, images, ids, noise, np.float32(quality), metric, sampler))
    return [row[:length] for row, length in zip(np.asarray(ids), lengths)]

  def detokenize(
    self,
    ids: TokenIds,
    keep_k: int | Sequence[int] | jax.Array | None = None,
    key: jax.Array | None = None,
    noise: jax.Array | None = None,
    num_steps: int = 25,
    guidance: str | None = "apg",
    guidance_scale: float | Callable[[float], float] = 7.5,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
  ) -> jax.Array:
    """Turns token ids back into images, by guided Euler steps of the rectified flow.

    Args:
      ids: int [b, n], n from 1 to num_registers, or a list of sequences of different lengths.
      keep_k: how many of them to use, one number or one a sample; default: all that are given.
      key: draws the noise; give it or noise.
      noise: starting latents [b, h, w, c] (h = w = image_size / 8 for the usual VAE).
      num_steps: Euler steps.
      guidance: "apg" (adaptive projected guidance), "cfg" or None.
      guidance_scale: a number, or a function of t in (0, 1] called once a step. 1 is no guidance.
      guidance_interval: the times t at which guidance is applied; the other steps take half the time.

    Returns:
      images float32 [b, h, w, 3], about [-1, 1] and not clipped.
    """
    ids, keep_k = self._ids(ids, keep_k)
    sampler = self._sampler(num_steps, guidance, guidance_scale, guidance_interval)
    return _detokenize(self, ids, keep_k, self._noise(key, noise, len(ids)), sampler)

  def encode_latents(self, images: Images, key: jax.Array | None = None) -> jax.Array:
    """images, as for tokenize, to scaled latents float32 [b, h, w, c]; with a key a sample of the posterior."""
    return _encode_latents(self, self._images(images), key)

  def decode_latents(self, z: jax.Array) -> jax.Array:
    """Scaled latents [b, h, w, c] to images float32 [b, h', w', 3], about [-1, 1] and not clipped."""
    self._check_latents("z", z)
    return _decode_latents(self, z)

  def velocity(
    self,
    x_t: jax.Array,
    t: float | jax.Array,
    ids: TokenIds,
    keep_k: int | Sequence[int] | jax.Array | None = None,
    drop_condition: bool | Sequence[bool] | jax.Array | None = None,
  ) -> jax.Array:
    """The decoder's prediction of noise - z, one evaluation of the flow.

    Args:
      x_t: noised latents (1 - t) z + t noise [b, h, w, c].
      t: in [0, 1], one number or one a sample.
      ids, keep_k: as for detokenize.
      drop_condition: where True no token is used (the unconditional velocity); default: nowhere.

    Returns:
      float32 [b, h, w, c].
    """
    ids, keep_k = self._ids(ids, keep_k)
    batch = len(ids)
    self._check_noised("x_t", x_t, batch)
    t = _per_sample("t", t, batch, jnp.float32)
    if not isinstance(t, jax.core.Tracer) and not bool(((t >= 0) & (t <= 1)).all()):
      raise ValueError(f"t must lie in [0, 1], got {np.asarray(t)}")
    drop = _per_sample("drop_condition", False if drop_condition is None else drop_condition, batch, bool)
    return _velocity(self, x_t, t, ids, keep_k, drop)

  def save(self, folder: str | os.PathLike):
    """Writes a folder that load reads: weights.safetensors (each array in its type) and config.json."""
    saving.save_folder(folder, self.config, self.params)

  def to_official(self, path: str | os.PathLike):
    """Writes what the authors' PyTorch code reads: a .safetensors file, or a folder in the hub's layout.

    A VAE alone is written as diffusers does. ValueError where the official format has no words for this model.
    """
    saving.save_official(path, self.config, self.params)

  def _tokenizer_config(self) -> FrozenConfigDict:
    if self.config.stage != "tokenizer":
      raise ValueError(f"this is a model of stage {self.config.stage!r}: it has latents, but no tokens")
    return self.config

  def _images(self, images: Images) -> jax.Array | np.ndarray:
    """Checks images and returns them as an array [b, h, w, 3]."""
    if isinstance(images, str | os.PathLike | Image.Image):
      raise ValueError(f"images must be a list of images or an array, got a {type(images).__name__}: put it in a list")
    if isinstance(images, Sequence):
      if not len(images):
        raise ValueError("images is an empty list")
      return np.stack([self._image(image) for image in images])
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
      raise ValueError(f"images must have shape [b, h, w, 3], got {list(images.shape)}")
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(f"images must be uint8 or floating point in [-1, 1], got {images.dtype}")
    # A resampled picture may overshoot a little; NaN is refused too.
    if isinstance(images, np.ndarray) and images.dtype != np.uint8 and not np.abs(images).max() < 2:
      raise ValueError(f"float images must lie in [-1, 1], got {images.min()} to {images.max()}: scale or give uint8")
    network = _network(self.config)
    unit = network.downscale * (network.encoder.patch_size if network.encoder else 1)
    if images.shape[1] % unit or images.shape[2] % unit:
      raise ValueError(f"images of {images.shape[1]} x {images.shape[2]} pixels: sides must be multiples of {unit}")
    return images

  def _image(self, image: Image.Image | str | os.PathLike) -> np.ndarray:
    if not isinstance(image, str | os.PathLike | Image.Image):
      raise ValueError(f"a list of images holds Pillow images or paths, got a {type(image).__name__}: stack arrays")
    try:
      return transforms.center_crop(image, self.image_size)
    except transforms.DECODE_ERRORS as e:
      raise ValueError(f"the image {image} cannot be read: {e}") from e

  def _ids(self, ids: TokenIds, keep_k) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]:
    """Checks token ids and returns (int32 [b, slots], padded with 0 or cut to what is used; keep_k int32 [b])."""
    total = self.num_registers
    lengths = None
    if not hasattr(ids, "ndim"):
      rows = [np.asarray(row) for row in ids]
      if not rows or not all(row.ndim == 1 and (np.issubdtype(row.dtype, np.integer) or not row.size) for row in rows):
        raise ValueError("ids must be an integer array [b, n] or a list of sequences of whole numbers")
      lengths = np.asarray([len(row) for row in rows], np.int32)
      ids = np.stack([np.pad(row.astype(np.int64), (0, lengths.max() - len(row))) for row in rows])
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(f"ids must be integers [b, n], got {ids.dtype} {list(ids.shape)}")
    batch, width = ids.shape
    lengths = np.full(batch, width, np.int32) if lengths is None else lengths
    if not batch or not lengths.min() >= 1 or width > total:
      raise ValueError(f"a sequence has 1 to {total} ids, got {sorted(set(lengths.tolist()))}")
    if not isinstance(ids, jax.core.Tracer):
      low, high = int(ids.min()), int(ids.max())
      if low < 0 or high >= self.num_codes:
        raise ValueError(f"token id {low if low < 0 else high} is out of range: ids are 0 to {self.num_codes - 1}")
    keep_k = _per_sample("keep_k", lengths if keep_k is None else keep_k, batch, jnp.int32)
    if not isinstance(keep_k, jax.core.Tracer):
      wrong = (keep_k < 1) | (keep_k > lengths)
      if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"keep_k={int(keep_k[i])} of sample {i} must lie between 1 and its {lengths[i]} ids")
    most = width if isinstance(keep_k, jax.core.Tracer) else int(keep_k.max())
    length = self._length(most)
    ids = ids[:, :length] if isinstance(ids, jax.core.Tracer) else np.asarray(ids)[:, :length].astype(np.int32)
    pad = jnp.pad if isinstance(ids, jax.core.Tracer) else np.pad
    return pad(ids, ((0, 0), (0, max(length - width, 0)))), keep_k

  def _length(self, count: int) -> int:
    """How many registers run where more than `count` are needed: one of a few sizes, so few programs are compiled."""
    total = self.num_registers
    return nested.padded_length(count, total) if self.config.fast else total

  def _sampler(self, num_steps, guidance, guidance_scale, guidance_interval) -> flextok.Sampler:
    """Checks the settings of detokenize and returns them with the guidance_scale of each step."""
    apg = {k: v for k, v in self.config.sampler.items() if k.startswith("apg_")}
    sampler = flextok.Sampler(num_steps, guidance or "none", 1.0, guidance_interval, **apg)
    if callable(guidance_scale):
      guidance_scale = np.asarray([guidance_scale(i / num_steps) for i in range(num_steps, 0, -1)], np.float32)
    if not isinstance(guidance_scale, jax.core.Tracer):
      if np.shape(guidance_scale) not in ((), (num_steps,)) or not np.isfinite(guidance_scale).all():
        raise ValueError(f"guidance_scale={guidance_scale!r} must be a finite number or a function of t that gives one")
      if np.all(np.asarray(guidance_scale) == 1):
        sampler = dataclasses.replace(sampler, guidance="none")
    scales = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), (num_steps,))
    return dataclasses.replace(sampler, guidance_scale=scales)

  def _noise(self, key, noise, batch: int) -> jax.Array:
    if noise is not None:
      self._check_noised("noise", noise, batch)
      return noise
    if key is None:
      raise ValueError(
        "detokenize starts from noise: pass key=jax.random.key(seed), or noise=... of shape "
        f"{[batch, *self.latent_shape]}"
      )
    return jax.random.normal(key, (batch, *self.latent_shape))

  def _check_noised(self, name: str, latents: jax.Array, batch: int):
    self._check_latents(name, latents)
    patch = _network(self.config).decoder.patch_size
    b, height, width, _ = np.shape(latents)
    if b != batch or height % patch or width % patch:
      raise ValueError(
        f"{name} must be {batch} latents, one a sequence of ids, with sides that are multiples of "
        f"{patch}; got shape {list(np.shape(latents))}"
      )

  def _check_latents(self, name: str, latents: jax.Array):
    shape, channels = np.shape(latents), self.latent_shape[-1]
    if len(shape) != 4 or shape[-1] != channels:
      raise ValueError(f"{name} must have shape [b, h, w, {channels}], got {list(shape)}")


def _per_sample(name: str, value, batch: int, dtype) -> np.ndarray | jax.Array:
  """One value, or one a sample, as an array [b]."""
  array = value if isinstance(value, jax.core.Tracer) else np.asarray(value)
  if array.shape not in ((), (batch,)) or not np.can_cast(array.dtype, dtype, "same_kind"):
    raise ValueError(f"{name} must be one {np.dtype(dtype).name}, or one for each of {batch} samples, got {value!r}")
  return (jnp if isinstance(value, jax.core.Tracer) else np).broadcast_to(array.astype(dtype), (batch,))


@functools.lru_cache(maxsize=32)
def _network(config: FrozenConfigDict) -> flextok.FlexTok:
  if config.stage == "tokenizer":
    return make_model(config)
  return flextok.FlexTok(None, None, (), make_vae(config), config.vae.scaling_factor)


def _apply(model: FlexTok, method: str, *args) -> jax.Array:
  # float32 means float32: accelerators would multiply in fewer bits by default, and a token may flip.
  precision = "highest" if model.config.dtype == "float32" else None
  with jax.default_matmul_precision(precision):
    return _network(model.config).apply({"params": model.params}, *args, method=method)


@functools.partial(jax.jit, static_argnames="num_tokens")
def _tokenize(model: FlexTok, images: jax.Array, num_tokens: int, key: jax.Array | None) -> jax.Array:
  return _apply(model, "tokenize", images, num_tokens, key)


@jax.jit
def _encode_latents(model: FlexTok, images: jax.Array, key: jax.Array | None) -> jax.Array:
  return _apply(model, "encode_latents", images, key)


@jax.jit
def _decode_latents(model: FlexTok, z: jax.Array) -> jax.Array:
  return _apply(model, "decode_latents", z)


@jax.jit
def _velocity(model: FlexTok, x_t, t, ids, keep_k, drop_condition) -> jax.Array:
  codes = fsq.ids_to_codes(ids, model.config.tokens.levels)
  return _apply(model, "velocity", x_t, t, codes, keep_k, drop_condition)


@jax.jit
def _detokenize(model: FlexTok, ids, keep_k, noise, sampler: flextok.Sampler) -> jax.Array:
  precision = "highest" if model.config.dtype == "float32" else None
  with jax.default_matmul_precision(precision):
    network = _network(model.config)
    latents = flextok.sample_latents(network, model.params, ids, keep_k, noise, sampler, model.config.fast)
  return _apply(model, "decode_latents", latents)


@functools.partial(jax.jit, static_argnames="metric")
def _lengths(model: FlexTok, images, ids, noise, quality, metric, sampler: flextok.Sampler):
  def decode(ids, keep_k):
    ids = adaptive.pad_to_slots(ids, model.num_registers)
    return jnp.clip(_detokenize(model, ids, keep_k, noise, sampler), -1, 1)

  return adaptive.shortest_length(decode, metric, images, ids, quality)
