"""The tokenizer that a study examines: its evaluation sets, their tokens, and functions that run on all devices."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.config import with_fields
from flextok_jax.core import images as images_lib
from flextok_jax.data import pipeline
from flextok_jax.evals.metrics import frechet
from flextok_jax.evals.metrics.image import Metric, make_compare
from flextok_jax.inference import decoding
from flextok_jax.ops import distances, nested
from flextok_jax.parallel.batching import Batched, replicate
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs


class Subject:
  """A tokenizer under study.

  Args:
    config: of stage "tokenizer"; config.data, config.eval and config.seed say what is evaluated.
    params: of the tokenizer.
    metrics: per-image metrics by name (evals/metrics/image.py).
    mesh: devices that batches are split over.

  Attributes:
    counts: the token counts of config.eval.
    compare: (uint8 [n, h, w, 3], uint8 [n, h, w, 3]) -> {name of a metric: float32 [n]}.
  """

  def __init__(self, config: ConfigDict, params: Any, metrics: Mapping[str, Metric], mesh: jax.sharding.Mesh):
    self.config, self.metrics, self.mesh = config, metrics, mesh
    self.params = replicate(params, mesh)
    self.counts = decoding.token_counts(config.eval.num_tokens, config.tokens.num_registers)
    self._gaussians: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    self.compare = make_compare(metrics, config.eval.batch_size, mesh)

  def settings_of(self, sets: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that determine the images of evaluation sets and the examples shown."""
    c = self.config
    sources = {name: c.data.sources[name].to_dict() for name in sets}
    return {"sources": sources, "num_images": c.eval.num_images, "grid_images": c.eval.grid_images}

  @functools.cached_property
  def sets(self) -> dict[str, dict[str, Any]]:
    """Evaluation sets by name, as pipeline.eval_set returns them."""
    c = self.config
    data, size = inputs.image_data(c), {"image_size": c.image_size, "num_images": c.eval.num_images}
    return {name: pipeline.eval_set(data, name, **size) for name in c.eval.sources}

  @functools.cached_property
  def _ids(self) -> dict[str, np.ndarray]:
    tokenize = make_stage(self.config).predict_fns["tokenize"]
    batched = Batched(tokenize, self.params, self.config.eval.batch_size, self.mesh, "images tokenized")
    return {name: batched(found["image"]) for name, found in self.sets.items()}

  def encoded(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images uint8 [n, h, w, 3], ids int32 [n, num_registers]) of an evaluation set."""
    return self.sets[name]["image"], self._ids[name]

  @functools.cached_property
  def _statistics(self) -> Batched:
    compute = lambda _, images: distances.statistics(images.astype(jnp.float32) / 127.5 - 1)
    return Batched(compute, (), self.config.eval.batch_size, self.mesh)

  def gaussian(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and covariance of fixed filters (distances.statistics) over images uint8 [n, h, w, 3]."""
    features = self._statistics(images)
    moments = frechet.Moments(features.shape[1])
    moments.add(features)
    return moments.mean, moments.covariance()

  def gaussian_of_set(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns gaussian of the images of an evaluation set, computed once."""
    if name not in self._gaussians:
      self._gaussians[name] = self.gaussian(self.sets[name]["image"])
    return self._gaussians[name]

  def decode_by_image(self, sampler: Mapping[str, Any]) -> Callable:
    """Returns decoding.decoder_by_image of the tokenizer, with other settings of its sampler."""
    config = with_fields(self.config, {f"sampler.{name}": value for name, value in sampler.items()})
    return decoding.decoder_by_image(make_stage(config).predict_fns["detokenize"], config.seed)

  def make_decode(
    self, sampler: Mapping[str, Any] | None = None
  ) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Makes a decoder, with other settings of its sampler if given.

    Returns:
      (ids int [n, k], lengths int [n] up to k, noise int [n]) -> uint8 [n, h, w, 3]. An image is decoded from its first
      `length` ids; noise i is that of image i in an evaluation. ValueError if an image is not finite.
    """
    return make_decode(
      self.decode_by_image(sampler or {}),
      self.params,
      self.config.tokens.num_registers,
      self.config.eval.batch_size,
      self.mesh,
    )

  @functools.cached_property
  def decode(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """The decoder with the tokenizer's own settings, see make_decode."""
    return self.make_decode()


def make_decode(
  decode_by_image: Callable, params: Any, num_registers: int, batch_size: int, mesh: jax.sharding.Mesh
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
  """Makes the decoder of Subject.make_decode; decode_by_image is that of decoding.decoder_by_image."""

  def restore(params, ids, keep_k, noise):
    images = images_lib.round_to_8bit(decode_by_image(params, ids, keep_k, noise))
    return images_lib.to_uint8(images), jnp.isfinite(images).all((1, 2, 3))

  batched = Batched(restore, params, batch_size, mesh, "images decoded")

  def decode(ids, lengths, noise):
    slots = nested.padded_length(int(lengths.max()), num_registers)
    padded = np.zeros((len(ids), slots), np.int32)  # ids past the length have no effect
    padded[:, : ids.shape[1]] = ids[:, :slots]
    images, finite = batched(padded, lengths.astype(np.int32), noise.astype(np.int32))
    if not finite.all():
      raise ValueError("decoded images are not finite: these weights diverged")
    return images

  return decode
