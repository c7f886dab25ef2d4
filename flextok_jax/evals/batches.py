"""Functions over many images, run batch by batch on all devices."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core import images as images_lib
from flextok_jax.evals.metrics.measures import Measure
from flextok_jax.inference import decoding
from flextok_jax.ops import nested
from flextok_jax.parallel.batching import Batched


def make_decode(
  detokenize: Callable, params: Any, num_registers: int, seed: int, batch_size: int, mesh: jax.sharding.Mesh
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
  """Makes the decoder of a tokenizer.

  Args:
    detokenize: of a stage's predict_fns.
    seed: of the noises.

  Returns:
    (ids int [n, k], lengths int [n] up to k, noise int [n]) -> uint8 [n, h, w, 3]. A picture is told by the first
    `length` ids and starts from the noise of its number, that of the image of this number in an evaluation of the seed.
    ValueError where one is not finite.
  """
  by_image = decoding.decoder_by_image(detokenize, seed)

  def restore(params, ids, keep_k, noise):
    images = images_lib.round_to_8bit(by_image(params, ids, keep_k, noise))
    return images_lib.to_uint8(images), jnp.isfinite(images).all((1, 2, 3))

  batched = Batched(restore, params, batch_size, mesh)

  def decode(ids, lengths, noise):
    slots = nested.padded_length(int(lengths.max()), num_registers)
    padded = np.zeros((len(ids), slots), np.int32)  # ids at or past the length have no influence
    padded[:, : ids.shape[1]] = ids[:, :slots]
    pictures, finite = batched(padded, lengths.astype(np.int32), noise.astype(np.int32))
    if not finite.all():
      raise ValueError("decoded pictures are not finite: these weights diverged")
    return pictures

  return decode


def make_compare(
  measures: Mapping[str, Measure], batch_size: int, mesh: jax.sharding.Mesh
) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
  """Makes the function of two uint8 [n, h, w, 3] that returns {name of a measure: float32 [n]}."""

  def values(measures, a, b):
    a, b = (x.astype(jnp.float32) / 255 for x in (a, b))
    return {name: measure(a, b) for name, measure in measures.items()}

  batched = Batched(values, dict(measures), batch_size, mesh)

  def compare(a, b):
    found = batched(a, b)
    return {name: found[name] for name in measures}  # jax sorts names

  return compare
