"""The train state and its one pure update."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from flextok_jax.parallel import sharding
from flextok_jax.stages import lora
from flextok_jax.training import metrics as metrics_lib

Params = Any


class TrainState(flax.struct.PyTreeNode):
  """The state of a run; all float leaves are float32."""

  step: jax.Array  # int32 [], number of updates done
  params: Params  # trained top-level parts, of the model and auxiliary ones
  frozen: Params  # frozen top-level parts
  ema: Params  # moving average of params
  opt_state: Any

  def joined(self, average: bool = False) -> Params:
    """Returns all parts, trained and frozen; `average`: the moving average. Stage.merged makes a model of them."""
    return {**(self.ema if average else self.params), **self.frozen}


def init_state(stage, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
  """Returns a new state; leaves are boxed with their logical axes."""
  params, frozen = stage.init(key)
  helpers, networks = stage.init_auxiliary(jax.random.fold_in(key, 1))
  if stage.lora:
    helpers = {**helpers, lora.PART: stage.lora.init(jax.random.fold_in(key, 2), frozen)}
  params, frozen = {**params, **helpers}, {**frozen, **networks}
  return TrainState(
    step=jnp.int32(0),
    params=params,
    frozen=frozen,
    ema=jax.tree.map(jnp.copy, params),  # donated buffers must not be shared
    opt_state=optimizer.init(params),
  )


def state_shardings(boxed: TrainState, mesh: jax.sharding.Mesh, shard_update: bool) -> TrainState:
  """Returns the sharding of each array of a state.

  Args:
    boxed: abstract state of init_state.
    mesh: of devices.
    shard_update: whether optimizer state and average are sharded over "data" as well (ZeRO stage 1, Rajbhandari et al.
      2020): each device then updates a part of the parameters that it holds whole, and gathers the others'.
  """
  shardings = sharding.tree_shardings(boxed, mesh)
  if not shard_update:
    return shardings
  place = lambda tree: sharding.tree_shardings(tree, mesh, over_data=True)
  return shardings.replace(ema=place(boxed.ema), opt_state=place(boxed.opt_state))


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
  """Returns the decay at a step: min(decay, (1 + step) / (10 + step)), so early averages forget the initial values."""
  return jnp.minimum(decay, (1 + step) / (10 + step))


def make_update(
  stage, optimizer: optax.GradientTransformation, *, accumulate_steps: int, decay: float
) -> Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]:
  """Returns the pure function update(state, batch, key) -> (state, metrics); jit it with the state donated.

  It folds state.step into the key (and the index of the part, if gradients are accumulated over equal parts of the
  batch). Metrics are those of training/metrics.py, to be merged over steps.
  """

  def grads_of(params, frozen, batch, key, step):
    loss_fn = lambda p: stage.loss_fn(stage.attached({**p, **frozen}), batch, key, step)
    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return grads, metrics

  def accumulated(params, frozen, batch, key, step):
    # Row r goes to part r % accumulate_steps, so every device keeps its own rows: [b, ...] -> [parts, b / parts, ...].
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulate_steps, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total, part):
      index, batch = part
      result = grads_of(params, frozen, batch, jax.random.fold_in(key, index), step)
      return jax.tree.map(jnp.add, total, result), None

    shapes = jax.eval_shape(grads_of, params, frozen, jax.tree.map(lambda x: x[0], parts), key, step)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(body, zeros, (jnp.arange(accumulate_steps, dtype=jnp.int32), parts))
    return jax.tree.map(lambda g: g / accumulate_steps, grads), metrics

  def update(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(key, state.step)
    inputs = {name: x for name, x in batch.items() if name != "unreadable"}
    compute = accumulated if accumulate_steps > 1 else grads_of
    grads, metrics = compute(state.params, state.frozen, inputs, key, state.step)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    d = ema_decay(decay, state.step)
    ema = jax.tree.map(lambda e, p: e * d + p * (1 - d), state.ema, params)

    step = state.step + 1
    finite = jnp.isfinite(metrics["loss"][0]) & jnp.isfinite(norm)
    metrics = metrics_lib.from_update(
      dict(metrics, grad_norm=(norm, 1)), batch["unreadable"].sum(dtype=jnp.int32), finite, step
    )
    return state.replace(step=step, params=params, ema=ema, opt_state=opt_state), metrics

  return update
