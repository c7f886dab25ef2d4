"""The tokenizer of the public interface: flextok_jax.load and FlexTok."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict
import numpy as np
from PIL import Image

from flextok_jax.config import TOKENIZER_STAGES, with_fields
from flextok_jax.config.ranges import MAX_TILE
from flextok_jax.core.errors import quote
from flextok_jax.inference import adaptive, programs, sharing, validation
from flextok_jax.inference.validation import Array, Images, Scale, TokenIds
from flextok_jax.models.tokenizer.flextok import Sampler
from flextok_jax.ops import distances, fsq
from flextok_jax.parallel import batching
from flextok_jax.stages import tokenizer as tokenizer_stage
from flextok_jax.stages.tokenizer import check_sampler
from flextok_jax.weights import fingerprints, loading, saving

KeepK = int | Sequence[int] | Array
FEATURES = ("registers", "patches", "codes")


def load(
  source: str | os.PathLike,
  dtype: str | None = None,
  *,
  vae_norm_num_groups: int = 32,
  mup_base_width: int | None = None,
  image_size: int | None = None,
  posemb_scaling: str | None = None,
  vae_tile: int | None = None,
  mesh: Mesh | None = None,
  revision: str | None = None,
  subfolder: str = "",
) -> FlexTok:
  """Loads a tokenizer, or a VAE alone, which only encodes and decodes latents.

  Args:
    source: the name of a model that ships, such as "glyphs"; a repository of the Hugging Face hub
      ("EPFL-VILAB/flextok_d18_d28_dfn"), an official .safetensors file or folder, a folder of diffusers' AutoencoderKL,
      or a workdir, folder or weights file of ours.
    dtype: type of the parameters and of the computation, "float32" or "bfloat16"; default: that of the config, for
      official checkpoints float32. The VAE has its own (float32 in official checkpoints).
    vae_norm_num_groups: groups of the VAE's GroupNorms, which official files do not state (32 in the released models).
    mup_base_width: base width of an official model trained with use_mup_readout, which its files do not state.
    image_size: pixels a side, in place of the checkpoint's own (256 in official ones, whose files do not state it).
    posemb_scaling: how encoder and decoder use their position tables, in place of the checkpoint's own: with
      "interpolate" or "scaled" images may have any size, with "absolute" none above the table's (config/defaults.py).
    vae_tile: pixels per side above which images are encoded and decoded in tiles of at most this size, overlap
      included, to save memory; 0: never; default: the checkpoint's (config.vae.tile).
    mesh: devices to place the parameters on, by their logical axes; default: the first device.
    revision: branch, tag or commit of a repository; default: its main branch.
    subfolder: of the folder or repository.

  Raises:
    FileNotFoundError: there is no checkpoint, or it cannot be downloaded; the message says which file to put where.
    ValueError: a damaged, foreign or unsupported checkpoint; the message names the cause.
  """
  config, params = loading.load(
    validation.path("source", source),
    param_dtype=None,
    dtype=dtype,
    vae_norm_num_groups=validation.at_least_one("vae_norm_num_groups", vae_norm_num_groups),
    mup_base_width=None if mup_base_width is None else validation.at_least_one("mup_base_width", mup_base_width),
    image_size=None if image_size is None else validation.at_least_one("image_size", image_size),
    posemb_scaling=posemb_scaling,
    vae_tile=None if vae_tile is None else validation.whole_number("vae_tile", vae_tile, 0, MAX_TILE),
    mesh=mesh,
    revision=revision,
    subfolder=subfolder,
  )
  if config.stage == "ar":
    raise ValueError(f"{source} is a generator: load it by flextok_jax.load_ar")
  return FlexTok(params, FrozenConfigDict(config))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True, repr=False)
class FlexTok(sharing.SharedModel):
  """A tokenizer: its parameters and its config (arXiv 2502.13967).

  A pytree (the config is static): it can be passed through jax.jit, where all methods work except tokenize by quality.
  Outside, each method is compiled once per shape of its arguments.
  """

  params: Any
  config: FrozenConfigDict

  def __repr__(self) -> str:
    c = self.config
    tokens = f", {c.tokens.num_registers} tokens of {fsq.num_codes(c.tokens.levels):,} codes"
    return (
      f"FlexTok({c.image_size} px{tokens if c.stage in TOKENIZER_STAGES else ', VAE alone'}, {sharing.describe(self)})"
    )

  @classmethod
  def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> FlexTok:
    """Returns load(source, **options)."""
    return load(source, **options)

  @property
  def image_size(self) -> int:
    """Pixels a side of the images that the model was trained on."""
    return self.config.image_size

  @property
  def num_registers(self) -> int:
    """Largest number of tokens per image."""
    return self._tokenizer_config().tokens.num_registers

  @property
  def num_codes(self) -> int:
    """Size of the vocabulary: token ids are 0 to num_codes - 1."""
    return fsq.num_codes(self._tokenizer_config().tokens.levels)

  @property
  def fingerprint(self) -> str:
    """Identifies the token ids: tokenizers with the same fingerprint have the same (weights/fingerprints.py)."""
    return fingerprints.tokenizer(self._tokenizer_config(), self.params)

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, c) of the latents of an image of image_size."""
    return programs.make_network(self.config).latent_shape(self.image_size, self.image_size)

  def latent_shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
    """Returns (h, w, c) of the latents of an image of (height, width) pixels.

    Raises:
      ValueError: the patches of the decoder do not divide the size, its position table is too small, or tokens on a
        grid have another size.
    """
    network = programs.make_network(self.config)
    multiple = network.downscale * (network.decoder.patch_size if network.decoder else 1)
    shape = network.latent_shape(*validation.image_size(size, multiple))
    if network.decoder:
      self._check_grid("size", (1, *size), self.image_size)
      network.decoder.check_grid(*(side // network.decoder.patch_size for side in shape[:2]))
    return shape

  @property
  def patch_multiple(self) -> int:
    """Pixels whose multiples are sides of images that both encoder and decoder can cut into patches."""
    return programs.make_network(self.config).patch_multiple

  @property
  def sampler(self) -> Sampler:
    """The checkpoint's settings of detokenize (config.sampler)."""
    return Sampler(**self._tokenizer_config().sampler)

  def tokenize(
    self,
    images: Images,
    num_tokens: int | None = None,
    key: jax.Array | None = None,
    quality: float | None = None,
    metric: str | distances.Distance = "mse",
    noise: Array | None = None,
    num_steps: int | None = None,
    guidance: str | None = None,
    guidance_scale: Scale | None = None,
    guidance_interval: tuple[float, float] | None = None,
    batch_size: int | None = None,
    progress: bool | None = False,
    resize: str = "crop",
  ) -> jax.Array | list[np.ndarray]:
    """Encodes images as token ids: the same number for each, or, given a quality, the fewest that reach it.

    For a quality, each image is compared with the clipped reconstructions of its prefixes (adaptive.shortest_prefix).

    Args:
      images: [b, h, w, 3], uint8 or float in [-1, 1], of any sides that the patches divide and the position table
        holds; or a list of Pillow images or paths, which are converted to RGB (transparency on white) and resized.
      num_tokens: how many of the first tokens; default: all. Fewer take less time.
      key: to sample the VAE's posterior; default: its mode.
      quality: largest acceptable distance of a reconstruction. The arguments below have no effect without it.
      metric: the distance: "mse" (of pixels in [-1, 1]), "perceptual" (see ops/distances.py), or a function of two
        batches [b, h, w, 3] in [-1, 1] that jax can trace and that returns one number per image.
      noise: as for detokenize; default: the same for all images, so that a length depends on the image alone.
      num_steps, guidance, guidance_scale, guidance_interval: as for detokenize.
      batch_size: read and encode this many at a time; default: all at once. The ids are the same; but with a key,
        batch i has the key fold_in(key, i).
      progress: show a progress bar; None: a bar on a terminal, and lines elsewhere.
      resize: of a list. "crop": to image_size on the shorter side (bilinear), cropped to the centre; "fit": the whole
        picture, at about the area image_size x image_size and sides that the patches divide; "none": as it is.
        Pictures of one size run together; with a key, those of the i-th size that occurs have the key fold_in(key, i)
        if there are several.

    Returns:
      int32 [b, num_tokens]; given a quality, a list of b arrays int32 [1 to num_tokens], which detokenize takes.

    Raises:
      ValueError: an argument out of range, or a VAE alone, which has no tokens.
    """
    given: dict[str, Any] = dict(
      num_tokens=num_tokens, quality=quality, metric=metric, num_steps=num_steps, guidance=guidance
    )
    given |= dict(guidance_scale=guidance_scale, guidance_interval=guidance_interval)
    groups = {} if self._is_cropped(images, resize) else self.rows_by_size(cast(Sequence, images), resize)
    if len(groups) > 1:
      given |= dict(batch_size=batch_size, progress=progress, resize=resize)
      return self._tokenize_by_size(cast(Sequence, images), list(groups.values()), key, noise, given)
    if batch_size is not None or validation.progress(progress) is not False:
      return self._tokenize_in_batches(images, key, noise, given, batch_size, progress, resize)
    num_tokens = validation.token_count(num_tokens, self.num_registers)
    images, key = self._images(images, resize), _posterior_key(key)
    self._check_grid("images", images.shape, self.image_size)
    if quality is not None:  # its arguments are checked before anything is encoded
      goal = self._goal(images.shape, quality, metric, noise)
      sampler = self._sampler(num_steps, guidance, guidance_scale, guidance_interval)
    ids = programs.tokenize(self, images, programs.slots(self, num_tokens - 1), key)[:, :num_tokens]
    if quality is None:
      return ids
    if validation.is_traced(ids):
      raise ValueError("sequences of different lengths cannot leave jax.jit: call tokenize(quality=...) outside")
    lengths = np.asarray(programs.lengths(self, images, ids, *goal, sampler))
    return [row[:length] for row, length in zip(np.asarray(ids), lengths)]

  def detokenize(
    self,
    ids: TokenIds,
    keep_k: KeepK | None = None,
    key: jax.Array | None = None,
    noise: Array | None = None,
    num_steps: int | None = None,
    guidance: str | None = None,
    guidance_scale: Scale | None = None,
    guidance_interval: tuple[float, float] | None = None,
    batch_size: int | None = None,
    progress: bool | None = False,
    size: tuple[int, int] | None = None,
  ) -> jax.Array:
    """Decodes token ids to images, by guided Euler steps of the rectified flow.

    The settings of the sampler that are None are the checkpoint's own (config.sampler).

    Args:
      ids: int [b, n], n from 1 to num_registers, or a list of sequences of different lengths.
      keep_k: how many of them to use, one number or one per sample; default: all that are given.
      key: draws the noise: of sample i with fold_in(key, i); or one key per sample [b]. Give key or noise.
      noise: starting latents [b, h, w, c] (h = w = image_size / 8 for the usual VAE), which say the size of the images.
      num_steps: Euler steps.
      guidance: "apg" (adaptive projected guidance), "cfg" or "none".
      guidance_scale: a number, or a function of t in (0, 1] that is called once per step. 1: no guidance.
      guidance_interval: the times t at which guidance is applied; the other steps take half the time.
      batch_size: decode this many at a time; default: all at once. The images are the same.
      progress: show a progress bar; None: a bar on a terminal, and lines elsewhere.
      size: (height, width) of the images, which token ids do not tell; default: image_size, or that of the noise.

    Returns:
      Images float32 [b, h, w, 3], about [-1, 1] and not clipped.

    Raises:
      ValueError: an argument out of range, neither key nor noise, or a VAE alone, which has no tokens.
    """
    ids, keep_k = self._ids(ids, keep_k)
    sampler = self._sampler(num_steps, guidance, guidance_scale, guidance_interval)
    shape = self.latent_shape if size is None else self.latent_shape_of(size)
    if noise is not None:
      given = self._noised("noise", noise, len(ids))
      if size is not None and given.shape[1:] != shape:
        raise ValueError(f"size={size} needs noise of shape {[len(ids), *shape]}, got {list(given.shape)}")
      starts = lambda rows: given[rows]
    elif key is not None:
      keys = validation.keys(key, len(ids))
      starts = lambda rows: programs.sample_noise(keys[rows], shape)
    else:
      raise ValueError(
        f"detokenize starts from noise: pass key=jax.random.key(seed), or noise=... of shape {[len(ids), *shape]}"
      )
    if batch_size is None and validation.progress(progress) is False:
      return programs.decode(self, ids, keep_k, starts(slice(None)), sampler)

    def decode(batch: tuple[Array, Array, Array]) -> jax.Array:
      ids, keep_k, rows = batch
      return programs.decode(self, ids, keep_k, starts(rows), sampler)

    rows = np.asarray(ids), np.asarray(keep_k), np.arange(len(ids))
    return batching.apply_in_batches(decode, rows, validation.batch_size(batch_size), "images decoded", progress)

  def features(
    self,
    images: Images,
    what: str = "registers",
    layer: int | None = None,
    num_tokens: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = False,
  ) -> jax.Array:
    """Encodes images as features for other models: vectors after a block of the encoder, or the codes of the tokens.

    Only the blocks up to `layer` are computed. Tokens depend on the patches after the last block but one and not on
    those after the last, unless the tokens are a grid.

    Args:
      images: as for tokenize, whose latents are the mode of the VAE's posterior.
      what: "registers", the vectors from which the head makes tokens; "patches", those of the latents, row by row; or
        "codes", what the token ids stand for: the values of each channel of FSQ, rounded to its levels in [-1, 1].
      layer: number of the block of the encoder, from 1; default: the last, before the head and its LayerNorm.
      num_tokens: how many of the first registers or codes; default: all. Fewer take less time.
      batch_size: read and encode this many at a time; default: all at once. The features are the same.
      progress: show a progress bar; None: a bar on a terminal, and lines elsewhere.

    Returns:
      float32: registers [b, num_tokens, width], patches [b, h * w, width] of an h x w grid of patches, or codes
      [b, num_tokens, levels], levels being the number of channels of FSQ.

    Raises:
      ValueError: an argument out of range or without effect, registers of a tokenizer whose tokens are a grid, or a VAE
        alone.
    """
    c = self._tokenizer_config()
    if not isinstance(what, str) or what not in FEATURES:
      raise ValueError(f"what={quote(what)} must be one of {', '.join(FEATURES)}")
    if what == "registers" and c.tokens.layout == "grid":
      raise ValueError("the tokens of this model are a grid, without registers: use what='patches' or what='codes'")
    if what == "codes" and layer is not None:
      raise ValueError(f"layer={quote(layer)} has no effect on codes, which follow the last block: leave it out")
    if what == "patches" and num_tokens is not None:
      raise ValueError(f"num_tokens={quote(num_tokens)} has no effect on patches: leave it out")
    layer = validation.whole_number("layer", c.encoder.depth if layer is None else layer, 1, c.encoder.depth)
    count = validation.token_count(num_tokens, self.num_registers)

    def encode(images: Array) -> jax.Array:
      self._check_grid("images", images.shape, self.image_size)
      return encode_features(self, images, what, layer, count)

    if batch_size is None and validation.progress(progress) is False:
      return encode(self._images(images))
    return self._in_batches(images, lambda images, rows: encode(images), batch_size, progress)

  def encode_latents(
    self, images: Images, key: jax.Array | None = None, resize: str = "crop"
  ) -> jax.Array | list[jax.Array]:
    """Encodes images as scaled latents.

    Args:
      images: as for tokenize.
      key: to sample the VAE's posterior; default: its mode.
      resize: of a list, as for tokenize. Pictures of one size run together; with a key, those of the i-th size that
        occurs have the key fold_in(key, i) if there are several.

    Returns:
      float32 [b, h, w, c]; of a list with resize "fit" or "none", whose sizes may differ, a list of b arrays [h, w, c].

    Raises:
      ValueError: an argument out of range.
    """
    key = _posterior_key(key)
    if self._is_cropped(images, resize) or not len(images):
      return programs.encode_latents(self, self._images(images, resize), key)
    pictures, found = cast(Sequence, images), dict[int, jax.Array]()
    groups = self.rows_by_size(pictures, resize)
    for i, rows in enumerate(groups.values()):
      own_key = jax.random.fold_in(key, i) if key is not None and len(groups) > 1 else key
      found |= zip(rows, programs.encode_latents(self, self._images([pictures[row] for row in rows], resize), own_key))
    return [found[i] for i in range(len(pictures))]

  def decode_latents(self, z: Array) -> jax.Array:
    """Decodes scaled latents [b, h, w, c] to images float32 [b, h', w', 3], about [-1, 1] and not clipped."""
    return programs.decode_latents(self, validation.latents("z", z, self.latent_shape[-1]))

  def velocity(
    self,
    x_t: Array,
    t: float | Array,
    ids: TokenIds,
    keep_k: KeepK | None = None,
    drop_condition: bool | Sequence[bool] | Array | None = None,
  ) -> jax.Array:
    """Predicts noise - z, one evaluation of the flow.

    Args:
      x_t: noised latents (1 - t) z + t noise [b, h, w, c].
      t: in [0, 1], one number or one per sample.
      ids, keep_k: as for detokenize.
      drop_condition: where True no token is used (the unconditional velocity); default: nowhere.

    Returns:
      float32 [b, h, w, c].

    Raises:
      ValueError: an argument out of range, or a VAE alone, which has no tokens.
    """
    ids, keep_k = self._ids(ids, keep_k)
    batch = len(ids)
    x_t = self._noised("x_t", x_t, batch)
    drop = validation.per_sample("drop_condition", False if drop_condition is None else drop_condition, batch, bool)
    return programs.velocity(self, x_t, validation.times(t, batch), ids, keep_k, drop)

  def to_official(self, path: str | os.PathLike) -> None:
    """Writes what the authors' PyTorch code reads: a .safetensors file, or a folder in the hub's layout.

    A VAE alone is written in the format of diffusers.

    Raises:
      ValueError: the official format cannot express this model.
    """
    saving.save_official(validation.path("path", path), self.config, self.params)

  def _tokenize_in_batches(
    self,
    images: Images,
    key: jax.Array | None,
    noise: Array | None,
    given: dict[str, Any],
    batch_size: int | None,
    progress: bool | None,
    resize: str,
  ) -> Any:
    """Returns tokenize(images, key=key, noise=noise, **given), computed in batches of one size."""

    def encode(part: Array, rows: np.ndarray) -> Any:
      own_key = None if key is None else jax.random.fold_in(validation.one_key(key), int(rows[0]) // len(rows))
      found: Any = self.tokenize(part, key=own_key, noise=None if noise is None else noise[rows], **given)
      return found if given["quality"] is None else adaptive.pad_sequences(found, self.num_registers)

    found = self._in_batches(images, encode, batch_size, progress, resize)
    return found if given["quality"] is None else [np.asarray(ids)[:n] for ids, n in zip(*found)]

  def _is_cropped(self, images: Images, resize: str) -> bool:
    """Returns whether all images have one size: those of an array, or of a list with resize "crop"."""
    return validation.resize(resize) == "crop" or isinstance(images, str) or not isinstance(images, Sequence)

  def rows_by_size(
    self, images: Sequence[Image.Image | str | os.PathLike], resize: str
  ) -> dict[tuple[int, int], list[int]]:
    """Returns {(height, width): numbers of the pictures} of a list, as tokenize reads them with `resize`."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(validation.sizes(images, validation.resize(resize), self.image_size, self.patch_multiple)):
      groups.setdefault(size, []).append(i)
    return groups

  def _tokenize_by_size(
    self, images: Sequence, groups: Sequence[Sequence[int]], key: jax.Array | None, noise: Any, given: dict[str, Any]
  ) -> Any:
    """Returns tokenize(images, key=key, **given) of pictures in groups of one size."""
    if noise is not None:
      raise ValueError(f"noise is of one size, and the images have {len(groups)} sizes: call tokenize once per size")
    found: dict[int, Any] = {}
    for i, rows in enumerate(groups):
      own_key = None if key is None else jax.random.fold_in(validation.one_key(key), i)
      found |= zip(rows, self.tokenize([images[row] for row in rows], key=own_key, **given))
    ids = [found[i] for i in range(len(images))]
    return ids if given["quality"] is not None else jnp.stack(ids)

  def _in_batches(
    self,
    images: Images,
    encode: Callable[[Array, np.ndarray], Any],
    batch_size: int | None,
    progress: bool | None,
    resize: str = "crop",
  ) -> Any:
    """Returns encode(images [b, h, w, 3], their numbers [b]) of all images, which are read in batches of one size."""
    count = len(images) if isinstance(images, Sequence | np.ndarray | jax.Array) else 0
    if not count or isinstance(images, str):
      return self._images(images)  # raises the error

    def read(rows: np.ndarray) -> Any:
      kept = np.unique(rows)  # without the padding, which need not be read again
      part = self._images([images[i] for i in kept] if isinstance(images, Sequence) else images[kept], resize)
      return encode(np.pad(part, ((0, len(rows) - len(kept)), *((0, 0),) * 3), mode="edge"), rows)

    rows, batch_size = np.arange(count), validation.batch_size(batch_size)
    return batching.apply_in_batches(read, rows, batch_size, "images encoded", progress)

  def _tokenizer_config(self) -> FrozenConfigDict:
    if self.config.stage not in TOKENIZER_STAGES:
      raise ValueError(f"this is a model of stage {self.config.stage!r}: it has latents, but no tokens")
    return self.config

  def _images(self, images: Images, resize: str = "crop") -> Array:
    network = programs.make_network(self.config)
    patch_size = network.encoder.patch_size if network.encoder else 1
    return validation.images(images, self.image_size, network.downscale * patch_size, resize, network.patch_multiple)

  def _ids(self, ids: TokenIds, keep_k: KeepK | None) -> tuple[Array, Array]:
    """Returns (ids int32 [b, slots], keep_k int32 [b])."""
    ids, keep_k, most = validation.token_ids(ids, keep_k, self.num_registers, self.num_codes)
    return validation.fit_slots(ids, programs.slots(self, most)), keep_k

  def _sampler(
    self,
    num_steps: int | None = None,
    guidance: str | None = None,
    guidance_scale: Scale | None = None,
    guidance_interval: tuple[float, float] | None = None,
  ) -> Sampler:
    """Returns the sampler with the guidance scale of each step, so that another scale needs no new program."""
    sampler = validation.sampler(
      self.sampler,
      num_steps=num_steps,
      guidance=guidance,
      guidance_scale=guidance_scale,
      guidance_interval=guidance_interval,
    )
    check_sampler(self.config, sampler.num_steps, sampler.guidance)
    scale = sampler.guidance_scale
    mode = "none" if not validation.is_traced(scale) and np.all(np.asarray(scale) == 1) else sampler.guidance
    scales = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (sampler.num_steps,))
    return dataclasses.replace(sampler, guidance=mode, guidance_scale=scales)

  def _goal(
    self, shape: Sequence[int], quality: float, metric: str | distances.Distance, noise: Array | None
  ) -> tuple[Array, Array, distances.Distance]:
    """Returns the noise, the largest distance and the distance by which prefixes of images of a shape are judged."""
    quality, metric = validation.quality(quality), distances.resolve(metric)
    batch, height, width, _ = shape
    if noise is None:
      side = programs.make_network(self.config).downscale
      start = adaptive.shared_noise(0, (height // side, width // side, self.latent_shape[-1]))
      noise = jnp.broadcast_to(start, (batch, *start.shape))
    return self._noised("noise", noise, batch), np.asarray(quality, np.float32), metric

  def _noised(self, name: str, latents: Array, batch: int) -> Array:
    patch_size = programs.make_network(self._tokenizer_config()).decoder.patch_size
    latents = validation.noised_latents(name, latents, self.latent_shape[-1], batch, patch_size)
    self._check_grid(name, latents.shape, self.latent_shape[0])
    return latents

  def _check_grid(self, name: str, shape: Sequence[int], side: int) -> None:
    """Raises ValueError if the tokens are a grid, for images or latents [b, h, w, c] that are not of its size."""
    if self._tokenizer_config().tokens.layout == "grid" and tuple(shape[1:3]) != (side, side):
      raise ValueError(
        f"{name} must be {side} x {side}, as each token has its place in a grid, got shape {list(shape)}"
      )


def _posterior_key(key: Any) -> jax.Array | None:
  return None if key is None else validation.one_key(key)


def load_tokenizer(
  source: str | os.PathLike,
  *,
  num_steps: int | None = None,
  guidance: str | None = None,
  guidance_scale: float | None = None,
  posemb_scaling: str | None = None,
  vae_tile: int | None = None,
) -> FlexTok:
  """Loads a model that has tokens, with these settings of sampler, positions and VAE in its config; None keeps its own.

  Raises:
    FileNotFoundError, ValueError: see load; a VAE alone; or a setting out of range.
  """
  model = load(source, posemb_scaling=posemb_scaling, vae_tile=vae_tile)
  if model.config.stage not in TOKENIZER_STAGES:
    raise ValueError(f"{source} is a model of stage {model.config.stage!r}, which has no tokens")
  return with_sampler(model, num_steps=num_steps, guidance=guidance, guidance_scale=guidance_scale)


def with_sampler(
  model: FlexTok, *, num_steps: int | None = None, guidance: str | None = None, guidance_scale: float | None = None
) -> FlexTok:
  """Returns the model with other settings of the sampler in its config; None keeps its own.

  Raises:
    ValueError: a setting out of range.
  """
  given = {"num_steps": num_steps, "guidance": guidance, "guidance_scale": guidance_scale}
  sampler = validation.sampler(model.sampler, **given)
  fields = {f"sampler.{name}": value for name, value in dataclasses.asdict(sampler).items()}
  return dataclasses.replace(model, config=FrozenConfigDict(with_fields(model.config, fields)))


def with_positions(
  model: FlexTok, posemb_scaling: str | None, parts: Sequence[str] = ("encoder", "decoder")
) -> FlexTok:
  """Returns the model with another posemb_scaling of these parts, as load gives it; None keeps its own.

  With other positions of the encoder it is another tokenizer by its fingerprint; those of the decoder do not change it.

  Raises:
    ValueError: a scaling that the positions do not have.
  """
  if posemb_scaling is None:
    return model
  config = tokenizer_stage.with_positions(model._tokenizer_config(), posemb_scaling, parts)
  return dataclasses.replace(model, config=FrozenConfigDict(config))


def prefix_lengths(
  model: FlexTok, images: Array, ids: Array, quality: float, metric: str | distances.Distance = "mse"
) -> jax.Array:
  """Returns the length int32 [b] of the shortest prefix of each image's ids [b, n] that reaches a quality.

  See FlexTok.tokenize, of whose results these are the lengths: decoded by the model's own sampler, from one noise.

  Raises:
    ValueError: a bad quality or metric, or a VAE alone, which has no tokens.
  """
  return programs.lengths(model, images, ids, *model._goal(images.shape, quality, metric, None), model._sampler())


def encode_ids(model: FlexTok, images: Array, num_tokens: int) -> jax.Array:
  """FlexTok.tokenize without its checks: images [b, h, w, 3], of the batch size also a symbol of jax.export."""
  return programs.tokenize(model, images, programs.slots(model, num_tokens - 1), None)[:, :num_tokens]


def encode_features(model: FlexTok, images: Array, what: str, layer: int, num_tokens: int) -> jax.Array:
  """FlexTok.features without its checks: images [b, h, w, 3]."""
  found = programs.features(model, images, what, layer, programs.slots(model, num_tokens - 1))
  return found if what == "patches" else found[:, :num_tokens]


def decode_ids(model: FlexTok, ids: Array, keep_k: Array, noise: Array) -> jax.Array:
  """FlexTok.detokenize without its checks: ids int32 [b, programs.slots(model, largest keep_k)], keep_k int32 [b]."""
  return programs.decode(model, ids, keep_k, noise, model._sampler())
