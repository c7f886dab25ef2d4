"""What every stage is to training, evaluation and commands, which know nothing else of them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

Params = Any


class Stage:
  """A trainable model with its loss: pure functions over a tree of parameters, of which top-level parts have names."""

  def init(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns the trainable and the frozen parts of the model, boxed with logical axes: what weights files hold."""
    raise NotImplementedError

  def init_auxiliary(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns further parts, trainable and frozen, that the loss alone needs: checkpoints hold them, weights files not.

    They are optimised and averaged like the model's.
    """
    del key
    return {}, {}

  @property
  def pretrained_networks(self) -> Mapping[str, str]:
    """Frozen parts of init_auxiliary whose weights a new run reads from files: {part: network}, as "lpips_vgg"."""
    return {}

  def loss_fn(self, params: Params, batch: Mapping, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict]:
    """Returns the scalar to descend, and metrics: a dict of (sum, count) pairs, with "loss" among them.

    Args:
      params: all parts, joined.
      batch: arrays [b, ...].
      key: of this step.
      step: int32 [], updates done before.
    """
    raise NotImplementedError

  @property
  def predict_fns(self) -> dict[str, Callable]:
    """Pure functions of the model's parts, joined, for evaluation and commands."""
    raise NotImplementedError
