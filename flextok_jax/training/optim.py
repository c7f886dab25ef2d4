"""AdamW or Muon with warm-up and cosine decay."""

import jax
from ml_collections import ConfigDict
import optax
from optax import contrib

OPTIMIZERS = ("adamw", "muon")


def make_schedule(optim: ConfigDict, num_steps: int) -> optax.Schedule:
  """Returns step -> learning rate: linear warm-up, then a cosine to the end value at num_steps."""
  warmup = min(optim.warmup_steps, num_steps)
  return optax.warmup_cosine_decay_schedule(
      0.0, optim.learning_rate, warmup, max(num_steps, warmup + 1), optim.end_learning_rate
  )


def decay_mask(params):
  """True for the matrices and convolutions, which alone are decayed; params boxed or not."""
  is_kernel = lambda path, _: any(getattr(key, "key", None) == "kernel" for key in path)
  return jax.tree_util.tree_map_with_path(is_kernel, params)


def muon_dimensions(params):
  """Returns the MuonDimensionNumbers of the matrices of all transformer blocks, None of everything else.

  Layers of a scanned stack are matrices of their own, and so are the queries, keys, values and gates of one kernel.
  """

  def dimensions(path, x):
    names = [getattr(key, "key", None) for key in path]
    if "kernel" not in names or not {"attention", "cross", "mlp"} & set(names):
      return None
    axes = tuple(range(1 if "blocks" in names else 0, x.ndim))
    name = names[names.index("kernel") - 1]
    if name == "out":
      return contrib.MuonDimensionNumbers(axes[:-1], axes[-1:])
    return contrib.MuonDimensionNumbers(axes[:1], axes[1:] if name == "q" else axes[2:])

  return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(optim: ConfigDict, num_steps: int) -> optax.GradientTransformation:
  """Returns the optimiser of config.optim for a run of num_steps.

  "adamw", or "muon" (Jordan et al. 2024): the blocks' matrices move along the orthogonalised momentum, at the root mean
  square of Adam's updates (Liu et al. 2025, section 2.2) so that one learning rate serves both; the rest by Adam.
  """
  if optim.name not in OPTIMIZERS:
    raise ValueError(f"unknown optim.name {optim.name!r}: one of {', '.join(OPTIMIZERS)}")
  schedule = make_schedule(optim, num_steps)
  if optim.name == "muon":
    optimizer = contrib.muon(
        schedule,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        adam_b1=optim.b1,
        adam_b2=optim.b2,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
    )
  else:
    optimizer = optax.adamw(
        schedule, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, mask=decay_mask
    )
  return optax.chain(optax.clip_by_global_norm(optim.clip_norm), optimizer)
