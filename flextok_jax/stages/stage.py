"""The interface of a stage, as training, evaluation and commands use it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from flextok_jax.core.errors import quote
from flextok_jax.stages.lora import LoRA

Params = Any
Maps = Callable[[bool], bool]  # whether attention, with a mask or without, writes its logits to memory


def check_parts(field: str, names: Sequence[str], known: Sequence[str]) -> None:
  """Raises ValueError for the first of the names in a config field that is not a known part."""
  for name in names:
    if name not in known:
      raise ValueError(f"{field} names the part {quote(name)}: the parts trained here are {', '.join(known)}")


class Stage:
  """A trainable model and its loss: pure functions over a tree of parameters {part: parameters}.

  Attributes:
    parts: top-level parts of the model that the stage can train.
    block_parts: those of them with attention and MLP blocks that can have LoRA.
    frozen_parts: those that this run freezes (config.train.parts).
    lora: low-rank factors that this run trains in place of some parts; None: none.
  """

  parts: tuple[str, ...] = ()
  block_parts: tuple[str, ...] = ()
  frozen_parts: frozenset[str] = frozenset()
  lora: LoRA | None = None

  @property
  def trained_parts(self) -> tuple[str, ...]:
    """Those of `parts` that this run trains, in full or by low-rank factors."""
    return tuple(name for name in self.parts if name not in self.frozen_parts)

  def init(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns the trained and the frozen parts of the model, boxed with logical axes. Weights files hold both."""
    params, frozen = self.init_model(key)
    fixed = self.frozen_parts.union(self.lora.parts if self.lora else ())
    frozen = frozen | {name: params[name] for name in params if name in fixed}
    return {name: tree for name, tree in params.items() if name not in fixed}, frozen

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

  def use_lora(self, rank: int, alpha: float, parts: Sequence[str]) -> None:
    """Trains low-rank factors of some parts in place of their parameters.

    Args:
      rank: see LoRA, as for alpha; 0: no factors.
      alpha: see LoRA.
      parts: that have factors; (): all of block_parts that are not frozen.

    Raises:
      ValueError: a part is frozen, or has no factors.
    """
    if not rank:
      if parts:
        raise ValueError(f"lora.parts={quote(tuple(parts))} has no effect with lora.rank=0: set lora.rank")
      return
    if not self.block_parts:
      raise ValueError(f"lora.rank={rank} is for stages 'tokenizer' and 'ar': set lora.rank=0")
    check_parts("lora.parts", parts, self.block_parts)
    for name in parts:
      if name in self.frozen_parts:
        raise ValueError(f"lora.parts names the {name}, which train.parts freezes: add it to train.parts")
    parts = tuple(parts) or tuple(name for name in self.trained_parts if name in self.block_parts)
    if not parts:
      raise ValueError(f"lora.rank={rank} has no effect, as train.parts freezes {', '.join(self.block_parts)}")
    self.lora = LoRA(rank, alpha, parts)

  def attached(self, params: Params) -> Params:
    """Returns the parameters that loss_fn takes, of all parts of a train state in one dict."""
    return params if self.lora is None else self.lora.attach(params)

  def merged(self, params: Params) -> Params:
    """As attached, but with low-rank factors added to the parameters: the parts of the model, as in weights files."""
    return params if self.lora is None else self.lora.merge(params)

  def init_auxiliary(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns further parts, trainable and frozen, that only the loss needs: in checkpoints, but not in weights files.

    The trainable ones are optimised and averaged like those of the model.
    """
    del key
    return {}, {}

  def activation_bytes(self, rows: float, maps: Maps, images: bool) -> float:
    """Returns an estimate of the bytes of activations that an update holds at once on a device.

    Args:
      rows: of the batch on a device, in one of the parts that optim.accumulate_steps makes.
      maps: see Maps.
      images: whether the update gets images, and not what a frozen VAE made of them.
    """
    raise NotImplementedError

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
