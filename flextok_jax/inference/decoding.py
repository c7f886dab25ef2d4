"""Tokenization and decoding of many images: token counts, per-image noise, sampler settings, batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core import images as images_lib
from flextok_jax.ops import guidance as guidance_lib
from flextok_jax.ops import nested


def token_counts(requested: Sequence[int], num_registers: int) -> tuple[int, ...]:
  """Returns the token counts to report, ascending; () means the powers of two up to num_registers, and itself.

  Raises:
    ValueError: a count outside 1..num_registers.
  """
  if not requested:
    return nested.powers_of_two(num_registers)
  for count in requested:
    if not 1 <= count <= num_registers:
      raise ValueError(f"num_tokens={count} is out of range: this model takes 1 to {num_registers} tokens")
  return tuple(sorted(set(requested)))


def decoder_by_image(detokenize: Callable, seed: int) -> Callable:
  """Makes a decoder in which the noise of image i is drawn by fold_in(key(seed), i).

  So an image's noise does not depend on its neighbours, the batch size or the number of tokens.

  Args:
    detokenize: of a stage's predict_fns.
    seed: of the noise.

  Returns:
    (params, ids [b, slots], keep_k [b], index [b]) -> images [b, h, w, 3]; index is the number of each image.

  Raises:
    ValueError: a seed that does not fit 32 bits.
  """
  check_seed(seed)

  def decode(params, ids, keep_k, index):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)
    return detokenize(params, ids, keep_k, keys)

  return decode


def check_seed(seed: int):
  """Raises ValueError for a seed that does not fit 32 bits."""
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed} is out of range: 0 to {2**32 - 1}")


def override_sampler(
  settings: Mapping[str, Any], num_steps: int | None, guidance: str | None, guidance_scale: float | None
) -> dict[str, Any]:
  """Returns sampler settings, such as config.sampler, with the arguments that are not None in place of its own.

  Raises:
    ValueError: an argument out of range, or a scale where guidance is off.
  """
  given = {"num_steps": num_steps, "guidance": guidance, "guidance_scale": guidance_scale}
  chosen = dict(settings) | {name: value for name, value in given.items() if value is not None}
  if chosen["num_steps"] < 1:
    raise ValueError(f"num_steps={chosen['num_steps']} must be at least 1")
  guidance_lib.check_mode(chosen["guidance"])
  if not math.isfinite(chosen["guidance_scale"]):
    raise ValueError(f"guidance_scale={chosen['guidance_scale']} must be finite")
  if chosen["guidance"] == "none" and guidance_scale is not None:
    raise ValueError(
      f"guidance_scale={guidance_scale} has no effect where guidance is 'none': give guidance=apg or guidance=cfg as well"
    )
  return chosen


def tokenize(tokenize_fn: Callable, params: Any, images: np.ndarray, batch_size: int) -> np.ndarray:
  """Tokenizes images uint8 [n, h, w, 3] batch by batch, the last one padded: int32 [n, k]."""
  tokenize_fn = jax.jit(tokenize_fn)
  batch_size = min(batch_size, len(images))
  ids = []
  for start in range(0, len(images), batch_size):
    rows = images[start : start + batch_size]
    padding = batch_size - len(rows)
    batch = np.pad(rows, ((0, padding), (0, 0), (0, 0), (0, 0)), mode="edge")
    ids.append(np.asarray(tokenize_fn(params, batch))[: len(rows)])
  return np.concatenate(ids)


def detokenize(
  decode: Callable, params: Any, sequences: Sequence[Sequence[int]], num_registers: int, batch_size: int
) -> Iterator[np.ndarray]:
  """Yields the image, uint8 [h, w, 3], of each sequence of 1 to num_registers ids; decode as of decoder_by_image."""
  restore = jax.jit(lambda *args: images_lib.round_to_8bit(decode(*args)) * 255)
  count = len(sequences)
  keep_k = np.asarray([len(sequence) for sequence in sequences], np.int32)
  slots = nested.padded_length(int(keep_k.max()), num_registers)
  ids = np.zeros((count, slots), np.int32)  # ids at or past keep_k have no influence
  for row, sequence in zip(ids, sequences):
    row[: len(sequence)] = sequence
  batch_size = min(batch_size, count)
  for start in range(0, count, batch_size):
    index = np.arange(start, start + batch_size, dtype=np.int32)
    rows = np.minimum(index, count - 1)  # the last batch is padded with the last sequence
    images = np.asarray(restore(params, ids[rows], keep_k[rows], index))
    yield from images[: count - start].round().astype(np.uint8)


def decode_prefixes(
  decode: Callable,
  params: Any,
  sequences: Sequence[np.ndarray],
  jobs: Sequence[tuple[int, int]],
  num_registers: int,
  batch_size: int,
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
  """Yields (job, image uint8 [h, w, 3]) in any order; job (i, k) is sequence i cut to k tokens, with the noise of i.

  Jobs that need the same number of slots run together, so each size is compiled once. decode as of decoder_by_image.
  """
  groups: dict[int, list[tuple[int, int]]] = {}
  for job in jobs:
    groups.setdefault(nested.padded_length(job[1], num_registers), []).append(job)
  for group in groups.values():
    owners = jnp.asarray([i for i, _ in group])
    own_noise = lambda params, ids, keep_k, index, owners=owners: decode(params, ids, keep_k, owners[index])
    cut = [sequences[i][:k] for i, k in group]
    yield from zip(group, detokenize(own_noise, params, cut, num_registers, batch_size))
