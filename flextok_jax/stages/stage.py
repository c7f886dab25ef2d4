"""The interface of a stage, as training, evaluation and commands use it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from flextok_jax.core.errors import quote

Params = Any


def check_parts(field: str, names: Sequence[str], known: Sequence[str]) -> None:
  """Raises ValueError for the first of the names in a config field that is not a known part."""
  for name in names:
    if name not in known:
      raise ValueError(f"{field} names the part {quote(name)}: the parts trained here are {', '.join(known)}")


class Stage:
  """A trainable model and its loss: pure functions over a tree of parameters {part: parameters}.

  Attributes:
    parts: top-level parts of the model that the stage can train.
    frozen_parts: those of them that this run freezes (config.train.parts).
  """

  parts: tuple[str, ...] = ()
  frozen_parts: frozenset[str] = frozenset()

  def init(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns the trained and the frozen parts of the model, boxed with logical axes. Weights files hold both."""
    params, frozen = self.init_model(key)
    frozen = frozen | {name: params[name] for name in params if name in self.frozen_parts}
    return {name: tree for name, tree in params.items() if name not in self.frozen_parts}, frozen

  def init_model(self, key: jax.Array) -> tuple[Params, Params]:
    """As init, with all `parts` among the trained ones."""
    raise NotImplementedError

  def train_only(self, names: Sequence[str]) -> None:
    """Freezes all parts but these; (): none.

    Raises:
      ValueError: a name is not one of `parts`.
    """
    check_parts("train.parts", names, self.parts)
    self.frozen_parts = frozenset(self.parts) - frozenset(names or self.parts)

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
