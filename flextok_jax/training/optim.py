"""AdamW with warm-up and cosine decay."""

import jax
from ml_collections import ConfigDict
import optax


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


def make_optimizer(optim: ConfigDict, num_steps: int) -> optax.GradientTransformation:
  """Returns the optimiser of config.optim for a run of num_steps."""
  return optax.chain(
      optax.clip_by_global_norm(optim.clip_norm),
      optax.adamw(
          make_schedule(optim, num_steps),
          b1=optim.b1,
          b2=optim.b2,
          eps=optim.eps,
          weight_decay=optim.weight_decay,
          mask=decay_mask,
      ),
  )
