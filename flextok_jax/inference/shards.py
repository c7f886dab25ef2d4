"""What a tokenizer or a VAE writes to shards: token ids, with lengths by quality, and latents (data/shards)."""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core.images import to_float
from flextok_jax.data.shards.files import ArrayRecords
from flextok_jax.data.shards.latents import LatentShards
from flextok_jax.data.shards.tokens import TokenRecords
from flextok_jax.data.shards.trajectories import TrajectoryRecords
from flextok_jax.inference import tokenizer as tokenizer_lib
from flextok_jax.inference import validation
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.ops import distances, fsq, nested
from flextok_jax.parallel import batching
from flextok_jax.stages import distill
from flextok_jax.stages.vae import make_vae
from flextok_jax.weights import fingerprints


def tokens(
  model: FlexTok,
  mesh: jax.sharding.Mesh,
  *,
  num_tokens: int | None = None,
  batch_size: int = 32,
  quality: float | None = None,
  metric: str = "mse",
) -> TokenRecords:
  """Makes the records of token shards, encoded on the devices of a mesh.

  Args:
    model: the tokenizer; its own sampler reconstructs images for a quality.
    mesh: devices of this process.
    num_tokens: ids per image; default: all.
    batch_size: images per batch, rounded up to a multiple of the devices.
    quality: store the length of the shortest prefix whose reconstruction is within this distance; None: all ids.
    metric: the distance, a name of ops/distances.py.

  Raises:
    ValueError: an argument out of range.
  """
  validation.at_least_one("batch_size", batch_size)
  num_tokens = validation.token_count(num_tokens, model.num_registers)
  facts = {
    "fingerprint": model.fingerprint,
    "dtype": model.config.dtype,
    "image_size": model.image_size,
    "num_ids": model.num_codes,
    "num_tokens": num_tokens,
  }
  if quality is not None:
    validation.quality(quality)
    distances.resolve(metric)
    facts["sampler"] = model.config.sampler.to_dict()
  model = batching.replicate(model, mesh)

  def encode(images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    ids = jnp.asarray(model.tokenize(images, num_tokens))
    return ids, None if quality is None else tokenizer_lib.prefix_lengths(model, images, ids, quality, metric)

  size = batching.batch_rows(batch_size, batch_size, mesh)
  return TokenRecords(encode, facts, size, quality, None if quality is None else metric, mesh)


def trajectories(
  model: FlexTok,
  mesh: jax.sharding.Mesh,
  *,
  steps: Sequence[int],
  seed: int,
  dtype: str = "float16",
  batch_size: int = 32,
) -> TrajectoryRecords:
  """Makes the records of trajectory shards: paths of a tokenizer with its own sampler, and lengths as in its training.

  Args:
    model: the teacher.
    mesh: devices of this process.
    steps: numbers of steps of the students; a path is stored at all times that their samplers use.
    seed: of noises and lengths.
    dtype: type to store paths in.
    batch_size: images per batch, rounded up to a multiple of the devices and of the rows of a group.

  Raises:
    ValueError: an argument out of range, or the model is not a teacher.
  """
  validation.at_least_one("batch_size", batch_size)
  fingerprint = fingerprints.tokenizer(model.config, model.params, decoder=True)
  config = distill.student_config(model.config, steps)
  stage, rows, n = distill.DistillStage(config), config.tokens.bucket_rows, config.tokens.num_registers
  params = {**model.params, "teacher": model.params["decoder"]}
  params, state = batching.replicate(params, mesh), model.latent_shape

  @jax.jit
  def encode(params: dict, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    latents: Any = stage.model.apply({"params": params}, to_float(batch["image"]), method="encode_latents")

    def draw(shard: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
      key = jax.random.fold_in(jax.random.key(seed), shard)
      noise_key, keep_key = (
        jax.random.fold_in(jax.random.fold_in(key, i), position // d) for i, d in ((0, 1), (1, rows))
      )
      keep_k, _ = nested.sample_keep_k(keep_key, 1, rows, n, config.tokens.nested_dropout, 0.0)
      return jax.random.normal(noise_key, state), keep_k[0, position % rows]

    noise, keep_k = jax.vmap(draw)(batch["shard"], batch["position"])
    paths = stage.paths(params, latents, noise, keep_k)
    return fsq.codes_to_ids(paths.codes, stage.model.levels), keep_k, paths.path.astype(dtype)

  facts = {
    "fingerprint": fingerprint,
    "compute_dtype": config.dtype,
    "image_size": model.image_size,
    "num_ids": model.num_codes,
    "num_tokens": n,
    "group_rows": rows,
    "dtype": dtype,
    "shape": [stage.intervals + 1, *state],
  }
  size = math.lcm(rows, batching.batch_rows(1, 1, mesh))
  return TrajectoryRecords(functools.partial(encode, params), facts, -(-batch_size // size) * size, mesh)


def latents(model: FlexTok, mesh: jax.sharding.Mesh, *, dtype: str = "float16", batch_size: int = 32) -> ArrayRecords:
  """Makes the records of latent shards, moments of a VAE's posterior, encoded on the devices of a mesh.

  Args:
    model: a VAE, or a tokenizer that has one.
    mesh: devices of this process.
    dtype: type to store.
    batch_size: images per batch, rounded up to a multiple of the devices.

  Raises:
    ValueError: the model has no VAE.
  """
  validation.at_least_one("batch_size", batch_size)
  if "vae" not in model.params:
    raise ValueError(
      f"a model of stage {model.config.stage!r} without a VAE has no latents to write: give a VAE, or a tokenizer "
      "that has one"
    )
  vae, params = make_vae(model.config), batching.replicate(model.params["vae"], mesh)

  @jax.jit
  def moments(params: dict, images: jax.Array) -> jax.Array:
    both: Any = vae.apply({"params": params}, to_float(images), method="encode")
    return jnp.concatenate(both, axis=-1).astype(dtype)  # [b, h, w, 2 c]

  size = model.image_size
  shape = jax.eval_shape(moments, params, np.zeros((1, size, size, 3), np.uint8)).shape[1:]
  facts = {
    "fingerprint": fingerprints.vae(model.config, model.params),
    "compute_dtype": model.config.vae.dtype,
    "image_size": size,
    "dtype": dtype,
    "shape": list(shape),
  }
  rows = batching.batch_rows(batch_size, batch_size, mesh)
  return ArrayRecords(LatentShards, functools.partial(moments, params), facts, rows, mesh)
