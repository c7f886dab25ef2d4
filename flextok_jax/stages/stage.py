"""The interface of a stage, as training, evaluation and commands use it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

Params = Any


class Stage:
  """A trainable model and its loss: pure functions over a tree of parameters {part: parameters}."""

  def init(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns the trainable and the frozen parts of the model, boxed with logical axes. Weights files hold both."""
    raise NotImplementedError

  def init_auxiliary(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns further parts, trainable and frozen, that only the loss needs: in checkpoints, but not in weights files.

    The trainable ones are optimised and averaged like those of the model.
    """
    del key
    return {}, {}

  def initial_weights(self, weights: Mapping[str, Params], params: Params) -> dict[str, Params]:
    """Returns the parts that a new run starts from, made of another model's weights by part and its own new params."""
    del params
    return dict(weights)

  @property
  def pretrained_networks(self) -> Mapping[str, str]:
    """Frozen parts of init_auxiliary whose weights a new run reads from files: {part: network}, as "lpips_vgg"."""
    return {}

  def loss_fn(self, params: Params, batch: Mapping, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict]:
    """Returns the loss to minimise [], and metrics {name: (sum, count)}, with "loss" among them.

    Args:
      params: all parts, in one dict.
      batch: arrays [b, ...].
      key: random key of this step.
      step: int32 [], number of updates before this one.
    """
    raise NotImplementedError

  @property
  def predict_fns(self) -> dict[str, Callable]:
    """Pure functions of the parts of the model, in one dict, for evaluation and commands."""
    raise NotImplementedError
