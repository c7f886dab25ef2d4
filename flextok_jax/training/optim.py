"""AdamW or Muon with warm-up, cosine decay and optional muP; warnings about unusual settings."""

from collections.abc import Collection, Mapping, Sequence
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax
from optax import contrib

from flextok_jax.stages import lora
from flextok_jax.training import mup

OPTIMIZERS = ("adamw", "muon")
_NEWTON_SCHULZ = (
  3.4445,
  -4.7750,
  2.0315,
)  # Jordan et al. 2024, as optax, but part of the state and so of a stated type
_DISCRIMINATOR = "discriminator"  # top-level part of stage "vae" that is trained against the others
_USUAL_RATE = 5e-4  # about the geometric mean of the learning rates in configs/


def make_schedule(optim: ConfigDict, num_steps: int) -> optax.Schedule:
  """Returns step -> learning rate: linear warm-up, then cosine decay to the end value at num_steps."""
  warmup = min(optim.warmup_steps, num_steps)
  return optax.warmup_cosine_decay_schedule(
    0.0, optim.learning_rate, warmup, max(num_steps, warmup + 1), optim.end_learning_rate
  )


def decay_mask(params):
  """Returns True for matrices and convolutions, which are decayed, and False for the rest; params boxed or not."""
  return jax.tree.map_with_path(lambda path, _: "kernel" in mup.names_of(path), params)


def by_muon(names: Sequence[str]) -> bool:
  """Returns whether Muon updates the parameter at these keys: it does for all matrices of transformer blocks."""
  return "kernel" in names and bool({"attention", "cross", "mlp"} & set(names))


def muon_dimensions(params):
  """Returns MuonDimensionNumbers for the matrices of transformer blocks and None for other parameters.

  The layers of a scanned stack are separate matrices, and so are the queries, keys and values in one kernel.
  """

  def dimensions(path, x):
    names = mup.names_of(path)
    if not by_muon(names):
      return None
    axes = tuple(range(1 if "blocks" in names else 0, x.ndim))
    name = names[names.index("kernel") - 1]
    if name == "out":
      return contrib.MuonDimensionNumbers(axes[:-1], axes[-1:])
    return contrib.MuonDimensionNumbers(axes[:1], axes[2:] if name in ("qkv", "kv") else axes[1:])

  return jax.tree.map_with_path(dimensions, params)


def make_optimizer(optim: ConfigDict, num_steps: int) -> optax.GradientTransformation:
  """Returns the optimiser for a run of num_steps; the top-level part "discriminator", if any, has its own.

  "adamw", or "muon" (Jordan et al. 2024): the matrices of transformer blocks move along the orthogonalised momentum,
  scaled to the root mean square of Adam's updates (Liu et al. 2025, section 2.2) so that one learning rate suits both;
  the rest by Adam. With mup_base_width the learning rate is that of a model of this width (training/mup.py); weight
  decay does not depend on the width. Factors of optim.rates apply last, to the whole update.

  The discriminator has Adam with the settings of optim.discriminator, its own gradient clipping and a schedule of the
  same shape.

  Args:
    optim: section config.optim.
    num_steps: length of the run.
  """
  main = _make_main(optim, num_steps)

  def pick(params):  # without a discriminator the state is that of a single optimiser
    if _DISCRIMINATOR not in params:
      return main
    parts = {"rest": main, _DISCRIMINATOR: _make_for_discriminator(optim, num_steps)}
    return optax.partition(parts, {name: name if name in parts else "rest" for name in params})

  return optax.GradientTransformation(
    lambda params: pick(params).init(params), lambda grads, state, params=None: pick(grads).update(grads, state, params)
  )


def _make_for_discriminator(optim: ConfigDict, num_steps: int) -> optax.GradientTransformation:
  c = optim.discriminator
  schedule = make_schedule(optim, num_steps)
  adam = optax.adam(lambda step: c.learning_rate / optim.learning_rate * schedule(step), b1=c.b1, b2=c.b2, eps=c.eps)
  return optax.chain(optax.clip_by_global_norm(c.clip_norm), adam)


def scale_parts(rates: Mapping[str, float]) -> optax.GradientTransformation:
  """Multiplies the updates of top-level parts, or of their LoRA, by their rates; parts without a rate keep theirs."""

  def scale(updates):
    of = lambda part, tree: scale(tree) if part == lora.PART else optax.tree.scale(rates.get(part, 1.0), tree)
    return {part: of(part, tree) for part, tree in updates.items()}

  return optax.stateless(lambda updates, params: scale(updates))


def _make_main(optim: ConfigDict, num_steps: int) -> optax.GradientTransformation:
  rates = optim.rates.to_dict()
  if set(rates.values()) == {1}:
    return _make_for_all(optim, num_steps)
  return optax.chain(_make_for_all(optim, num_steps), scale_parts(rates))


def _make_for_all(optim: ConfigDict, num_steps: int) -> optax.GradientTransformation:
  if optim.name not in OPTIMIZERS:
    raise ValueError(f"unknown optim.name {optim.name!r}: one of {', '.join(OPTIMIZERS)}")
  schedule, base_width, weight_decay = make_schedule(optim, num_steps), optim.mup_base_width, optim.weight_decay
  muon = optim.name == "muon"
  decay = 0.0 if base_width else weight_decay
  if muon:
    optimizer = contrib.muon(
      schedule,
      ns_coeffs=tuple(map(jnp.float32, _NEWTON_SCHULZ)),
      eps=optim.eps,
      weight_decay=decay,
      adam_b1=optim.b1,
      adam_b2=optim.b2,
      muon_weight_dimension_numbers=muon_dimensions,
      consistent_rms=0.2,
    )
  else:
    optimizer = optax.adamw(schedule, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=decay, mask=decay_mask)
  clip = optax.clip_by_global_norm(optim.clip_norm)
  if not base_width:
    return optax.chain(clip, optimizer)
  # Weight decay follows the schedule and not the width, as in the authors' code.
  mask = (lambda p: jax.tree.map_with_path(lambda path, _: by_muon(mup.names_of(path)), p)) if muon else decay_mask
  return optax.chain(
    clip,
    mup.scale_gradients(base_width),
    optimizer,
    mup.scale_by_width(base_width, by_muon if muon else lambda names: False),
    optax.add_decayed_weights(lambda step: -weight_decay * schedule(step), mask),
  )


def check(config: ConfigDict, trained: Collection[str]) -> list[str]:
  """Returns a warning for each setting of config.optim that is valid but probably a mistake.

  Args:
    config: of a run.
    trained: its trained parts, Stage.trained_parts.

  Raises:
    ValueError: settings that do not fit together.
  """
  c, num_steps = config.optim, config.train.num_steps
  warnings: list[str] = []
  if config.stage == "vae" and c.name == "muon":
    raise ValueError("optim.name='muon' is for transformers and stage 'vae' has no transformer blocks: use 'adamw'")
  if config.stage == "vae" and not config.vae_loss.train_encoder and c.weight_decay:
    raise ValueError(
      f"optim.weight_decay={c.weight_decay:g} would shrink the encoder, which vae_loss.train_encoder=False keeps: use 0"
    )
  for part, rate in c.rates.items():
    if rate != 1 and part not in trained:
      raise ValueError(f"optim.rates.{part}={rate:g} has no effect, as the {part} is not trained here: set it to 1")
  off = c.learning_rate / _USUAL_RATE
  if not 1 / 100 <= off <= 100:
    warnings.append(
      f"optim.learning_rate={c.learning_rate:g} is over 100 times {'above' if off > 1 else 'below'} the usual, which "
      f"is about {_USUAL_RATE:g} with {c.name} (Muon's updates have the size of Adam's here)"
    )
  if c.warmup_steps >= num_steps:
    warnings.append(
      f"optim.warmup_steps={c.warmup_steps} is not below train.num_steps={num_steps}: the learning rate only rises"
    )
  horizon = 1 / (1 - c.ema_decay)
  if horizon > num_steps:
    warnings.append(
      f"optim.ema_decay={c.ema_decay:g} averages {horizon:.0f} steps, the run has train.num_steps={num_steps}: the "
      "average will cover about its last tenth, as the decay warms up"
    )
  if not c.mup_base_width:
    return warnings
  if config.stage == "vae":
    raise ValueError(f"optim.mup_base_width={c.mup_base_width} is for transformers and stage 'vae' has no width: use 0")
  for part in ("ar",) if config.stage == "ar" else ("encoder", "decoder"):
    expected, given = c.mup_base_width / config[part].width, config[part].readout_multiplier
    if not math.isclose(expected, given, rel_tol=0.01):
      warnings.append(
        f"optim.mup_base_width={c.mup_base_width} goes with {part}.readout_multiplier={expected:.5g} "
        f"(mup_base_width / {part}.width), got {given:g}"
      )
  return warnings
