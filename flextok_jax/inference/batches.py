"""Tokenization and decoding of any number of images, in batches on all local devices.

Image i of a call with key k has the noise of FlexTok.detokenize, drawn by fold_in(k, i), whatever the batch size and
the number of tokens. So the commands write the images that the methods return.
"""

from collections.abc import Iterable, Iterator, Sequence
import itertools

import jax
import numpy as np

from flextok_jax.core import images as images_lib
from flextok_jax.inference import programs, tokenizer, validation
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.parallel import batching, sharding

Job = tuple[int, int]  # (i, k): decode sequence i from its first k tokens


def tokenize(model: FlexTok, images: np.ndarray, num_tokens: int | None = None, batch_size: int = 32) -> np.ndarray:
  """Encodes images uint8 [n, h, w, 3] as token ids int32 [n, num_tokens]; default: all tokens.

  Raises:
    ValueError: num_tokens is out of range.
  """
  validation.at_least_one("batch_size", batch_size)
  size = batching.batch_rows(batch_size, len(images), local_mesh())
  return np.concatenate(list(tokenize_batches(model, batching.slices(images, size), size, num_tokens)))


def tokenize_batches(
  model: FlexTok, images: Iterable[np.ndarray], size: int, num_tokens: int | None = None
) -> Iterator[np.ndarray]:
  """Yields the token ids int32 [b, num_tokens] of each batch of images uint8 [b, h, w, 3], b <= size."""
  return (ids for ids, _ in tokenize_to_quality(model, images, size, num_tokens, None))


def tokenize_to_quality(
  model: FlexTok,
  images: Iterable[np.ndarray],
  size: int,
  num_tokens: int | None,
  quality: float | None,
  metric: str = "mse",
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
  """Yields (token ids int32 [b, num_tokens], lengths int32 [b] or None) of each batch of images, see tokenize_batches.

  Args:
    quality: the lengths are those of the shortest prefixes whose reconstructions are within this distance; None: None.
    metric: the distance, a name of ops/distances.py.
  """
  mesh = local_mesh()

  def run(model: FlexTok, rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    ids = jax.numpy.asarray(model.tokenize(rows, num_tokens))
    return ids, None if quality is None else tokenizer.prefix_lengths(model, rows, ids, quality, metric)

  encode = jax.jit(run, out_shardings=sharding.replicated(mesh))
  model = batching.replicate(model, mesh)
  return batching.map_batches(lambda rows: encode(model, rows), images, size, mesh)


def detokenize(
  model: FlexTok, sequences: Sequence[Sequence[int] | np.ndarray], key: jax.Array, batch_size: int = 32
) -> Iterator[np.ndarray]:
  """Yields the image, uint8 [h, w, 3], of each sequence of ids, by the sampler of the model's config.

  Raises:
    ValueError: ids out of range.
  """
  jobs = [(i, len(sequence)) for i, sequence in enumerate(sequences)]
  for batch in _decode(model, sequences, jobs, key, batch_size):
    yield from batch


def decode_prefixes(
  model: FlexTok,
  sequences: Sequence[Sequence[int] | np.ndarray],
  jobs: Sequence[Job],
  key: jax.Array,
  batch_size: int = 32,
  sizes: Sequence[tuple[int, int]] | None = None,
) -> Iterator[tuple[Job, np.ndarray]]:
  """Yields (job, image uint8 [h, w, 3]) in any order; job (i, k) is sequence i cut to k tokens, with the noise of i.

  Jobs of the same size that need the same number of slots run together, so each size is compiled once.

  Args:
    sizes: (height, width) of the image of each sequence; None: the model's image_size.
  """
  groups: dict[tuple, list[Job]] = {}
  for job in jobs:
    size = None if sizes is None else sizes[job[0]]
    groups.setdefault((programs.slots(model, job[1]), size), []).append(job)
  for (_, size), group in groups.items():
    yield from zip(group, itertools.chain.from_iterable(_decode(model, sequences, group, key, batch_size, size)))


def _decode(
  model: FlexTok,
  sequences: Sequence[Sequence[int] | np.ndarray],
  jobs: Sequence[Job],
  key: jax.Array,
  batch_size: int,
  image_size: tuple[int, int] | None = None,
) -> Iterator[np.ndarray]:
  """Yields batches of the images uint8 [b, h, w, 3] of jobs, which run on the same number of slots."""
  validation.at_least_one("batch_size", batch_size)
  keep_k = np.asarray([count for _, count in jobs], np.int32)
  owners = np.asarray([i for i, _ in jobs], np.int32)
  ids = np.zeros((len(jobs), programs.slots(model, int(keep_k.max()))), np.int32)  # ids past keep_k have no effect
  for row, (i, count) in zip(ids, jobs):
    row[:count] = sequences[i][:count]
  mesh = local_mesh()
  model = batching.replicate(model, mesh)
  size = batching.batch_rows(batch_size, len(jobs), mesh)
  shape = model.latent_shape if image_size is None else model.latent_shape_of(image_size)

  def decode(batch: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    ids, keep_k, owners = batch
    noise = programs.sample_noise(_fold_in(key, owners), shape)
    return _to_uint8(tokenizer.decode_ids(model, ids, keep_k, noise))

  rows = batching.slices((ids, keep_k, owners), size)
  yield from batching.map_batches(decode, rows, size, mesh)


def decode_rows(
  model: FlexTok,
  ids: np.ndarray,
  keep_k: np.ndarray,
  keys: jax.Array,
  batch_size: int,
  image_size: tuple[int, int] | None = None,
) -> np.ndarray:
  """Returns images float32 [n, h, w, 3] in [-1, 1] of ids int32 [n, tokens], of which keep_k [n] count.

  Args:
    model: the tokenizer, whose own sampler is used.
    ids: those at or past keep_k have no effect.
    keep_k: from 1.
    keys: of the noise of each image [n].
    batch_size: images per batch.
    image_size: (height, width); None: the model's.
  """
  shape = model.latent_shape if image_size is None else model.latent_shape_of(image_size)
  mesh, slots = local_mesh(), programs.slots(model, int(keep_k.max()))
  model = batching.replicate(model, mesh)
  size = batching.batch_rows(batch_size, len(ids), mesh)
  ids = np.pad(ids[:, :slots], ((0, 0), (0, max(0, slots - ids.shape[1]))))
  data, impl = np.asarray(jax.random.key_data(keys)), jax.random.key_impl(keys)  # batches are of numpy arrays

  def decode(batch: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    ids, keep_k, data = batch
    noise = programs.sample_noise(jax.random.wrap_key_data(data, impl=impl), shape)
    return _clip(tokenizer.decode_ids(model, ids, keep_k, noise))

  return np.concatenate(list(batching.map_batches(decode, batching.slices((ids, keep_k, data), size), size, mesh)))


_clip = jax.jit(lambda images: jax.numpy.clip(images, -1, 1))
_fold_in = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))
_to_uint8 = jax.jit(images_lib.as_uint8)


def local_mesh() -> jax.sharding.Mesh:
  """Returns the mesh of the devices of this process."""
  return sharding.make_mesh(devices=jax.local_devices())
