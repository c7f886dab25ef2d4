"""The update of the train state, its metrics, and moving batches to devices."""

import functools

from flax.core.meta import unbox
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flextok_jax.data import pipeline
from flextok_jax.ops import nested
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.stages.stage import Stage
from flextok_jax.training import inputs, optim
from flextok_jax.training import metrics as metrics_lib
from flextok_jax.training.state import ema_decay, init_state, make_update
from tests.support import tiny_generators, vae_stage
from tests.support.runs import assert_trees_equal, config_of
from tests.support.tiny import make_params

# The update.


class LinearStage(Stage):
  """A stand-in stage: mean squared error of a linear map of the image, and a random draw."""

  def init(self, key):
    weights = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("in", "out"))(key, (12, 3))
    return {"linear": {"kernel": weights}}, {"vae": {"kernel": jnp.ones(2)}}

  def loss_fn(self, params, batch, key, step):
    x = batch["image"].astype(jnp.float32).reshape(-1, 12) / 255
    per_sample = jnp.square(x @ params["linear"]["kernel"] - params["vae"]["kernel"].sum()).mean(-1)
    low = per_sample < 2
    return per_sample.mean(), {
      "loss": (per_sample.sum(), per_sample.size),
      "low": (jnp.where(low, per_sample, 0).sum(), low.sum()),
      "draw": (jax.random.uniform(key), 1),
    }


def linear_batch(rows=8):
  rng = np.random.default_rng(0)
  return {"image": rng.integers(0, 256, (rows, 2, 2, 3), np.uint8), "unreadable": np.ones(rows, np.int32)}


def linear_run(steps=1, accumulate_steps=1, optimizer=None, decay=0.5, stage=None):
  """Returns the states and metrics after each step."""
  stage, optimizer = stage or LinearStage(), optimizer or optax.sgd(0.1)
  state = unbox(init_state(stage, optimizer, jax.random.key(0)))
  update = jax.jit(make_update(stage, optimizer, accumulate_steps=accumulate_steps, decay=decay))
  states, metrics = [state], []
  for _ in range(steps):
    state, step_metrics = update(state, linear_batch(), jax.random.key(1))
    states.append(state)
    metrics.append(metrics_lib.compute(step_metrics))
  return states, metrics


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch(parts):
  (_, whole), (expected,) = linear_run()
  (_, state), (metrics,) = linear_run(accumulate_steps=parts)
  np.testing.assert_allclose(state.params["linear"]["kernel"], whole.params["linear"]["kernel"], rtol=1e-6)
  for name in ("loss", "low", "grad_norm", "unreadable"):
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
  assert expected["unreadable"] == 8 and expected["low"] < expected["loss"]
  assert metrics["draw"] != expected["draw"]  # the mean of other draws, as each part has its own key


class HelpedStage(LinearStage):
  """A loss with parts outside the model: a trained bias and a frozen factor; it also depends on the step."""

  def init_auxiliary(self, key):
    return {"bias": {"bias": jax.random.normal(key, (3,))}}, {"factor": {"scale": jnp.float32(2)}}

  def loss_fn(self, params, batch, key, step):
    loss, metrics = super().loss_fn(params, batch, key, step)
    late = jnp.square(params["bias"]["bias"] * params["factor"]["scale"]).sum()
    return loss + jnp.where(step < 2, 0.0, late), metrics | {"step": (step, 1)}


@pytest.mark.parametrize("accumulate_steps", [1, 4])
def test_auxiliary_parts_are_trained_and_losses_receive_the_step(accumulate_steps):
  plain, _ = linear_run(3)
  states, metrics = linear_run(3, stage=HelpedStage(), accumulate_steps=accumulate_steps)
  for step, (alone, state) in enumerate(zip(plain, states)):
    np.testing.assert_allclose(state.params["linear"]["kernel"], alone.params["linear"]["kernel"], rtol=1e-6)
    assert set(state.joined()) == {"linear", "bias", "vae", "factor"} and state.frozen["factor"]["scale"] == 2
    first = states[0].params["bias"]["bias"]
    shrunk = 1 if step < 3 else 1 - 0.1 * 2 * 2**2  # sgd(0.1), from the third step on
    np.testing.assert_allclose(state.params["bias"]["bias"], shrunk * first, rtol=1e-6)
  assert [m["step"] for m in metrics] == [0, 1, 2]


def test_each_step_has_one_key_of_its_own():
  _, metrics = linear_run(3)
  assert len({m["draw"] for m in metrics}) == 3
  assert linear_run(3)[1] == metrics


def test_average_warms_up():
  states, _ = linear_run(12, decay=0.5)
  average = np.asarray(states[0].params["linear"]["kernel"])
  for step, state in enumerate(states[1:]):
    decay = min(0.5, (1 + step) / (10 + step))
    assert np.isclose(ema_decay(0.5, step), decay)
    average = decay * average + (1 - decay) * state.params["linear"]["kernel"]
    np.testing.assert_allclose(state.ema["linear"]["kernel"], average, rtol=1e-5)
  assert decay == 0.5


def test_frozen_parts_are_not_trained():
  optimizer = optim.make_optimizer(config_of().optim, 10)
  states, _ = linear_run(3, optimizer=optimizer)
  np.testing.assert_array_equal(states[-1].frozen["vae"]["kernel"], np.ones(2))
  assert int(states[-1].step) == 3
  shapes = {x.shape for x in jax.tree.leaves(states[-1].opt_state)}
  assert shapes == {(), (12, 3)}
  assert set(states[-1].joined()) == set(states[-1].joined(average=True)) == {"linear", "vae"}
  assert_trees_equal(states[-1].joined(average=True)["linear"], states[-1].ema["linear"])


def test_a_non_finite_gradient_is_reported():
  class Kink(LinearStage):  # a finite loss with an infinite slope
    def loss_fn(self, params, batch, key, step):
      loss, metrics = super().loss_fn(params, batch, key, step)
      return loss + jnp.sqrt(jnp.square(params["linear"]["kernel"] * 0).sum()), metrics

  _, (metrics,) = linear_run()
  assert metrics["first_bad_step"] == metrics_lib.NEVER
  _, (metrics,) = linear_run(stage=Kink())
  assert np.isfinite(metrics["loss"]) and metrics["first_bad_step"] == 1


def test_metrics_merge_as_weighted_means():
  make = lambda total, count, finite, step: metrics_lib.from_update(
    {"a": (total, count), "empty": (0.0, 0)}, jnp.int32(2), jnp.bool_(finite), jnp.int32(step)
  )
  merged = metrics_lib.merge(metrics_lib.merge(make(6.0, 3, True, 7), make(1.0, 1, False, 8)), make(3.0, 0, False, 9))
  assert metrics_lib.compute(merged) == {"a": 2.5, "unreadable": 6, "first_bad_step": 8}


# The tokenizer's loss.


@pytest.mark.parametrize("mode, registers", [("pow2", 4), ("uniform", 6), ("uniform_pow2", 6)])
def test_bucket_losses_sum_to_the_loss(mode, registers):
  tokens = dict(num_registers=registers, nested_dropout=mode, null_prob=0.3, saturation_weight=0.5)
  stage = make_stage(config_of(tokens=tokens))
  params = make_params(stage)
  batch = {"image": np.random.default_rng(1).integers(0, 256, (64, 16, 16, 3), np.uint8)}
  loss, metrics = jax.jit(stage.loss_fn)(params, batch, jax.random.key(0), 0)
  (total, count), (saturation, _) = metrics.pop("loss"), metrics.pop("saturation")
  assert set(metrics) == {"loss_null"} | {f"loss_k{k}" for k in nested.powers_of_two(registers)}
  assert count == 64 and sum(n for _, n in metrics.values()) == 64
  assert all(n > 0 for _, n in metrics.values()) and 8 < metrics["loss_null"][1] < 32
  np.testing.assert_allclose(sum(x for x, _ in metrics.values()), total, rtol=1e-5)
  assert saturation > 0  # added to the reported loss
  np.testing.assert_allclose(loss, (total + 0.5 * saturation) / 64, rtol=1e-6)


def test_loss_decreases_on_a_few_images():
  """Sixteen images are learned: initially the loss is the variance of noise - x0, about 1 + var(x0)."""
  config = config_of(optim=dict(learning_rate=5e-3, warmup_steps=20), flow=dict(t_sampling="uniform"))
  stage, optimizer = make_stage(config), optim.make_optimizer(config.optim, 300)
  update = make_update(stage, optimizer, accumulate_steps=1, decay=0.9)
  images = pipeline.eval_set(inputs.image_data(config), "synthetic", image_size=16, num_images=16)["image"]

  def step(state, _):
    state, metrics = update(state, {"image": images, "unreadable": np.zeros(16, np.int32)}, jax.random.key(1))
    return state, metrics["loss"].compute()

  @jax.jit
  def train(key):
    return jax.lax.scan(step, unbox(init_state(stage, optimizer, key)), length=300)[1]

  losses = np.asarray(train(jax.random.key(0)))
  assert np.mean(losses[-50:]) < 0.6 * np.mean(losses[:5]), (losses[:5], losses[-50:])


OPTIONS = dict(  # those that draw more
  tokens=dict(quantization_dropout=0.5, corruption=0.5, saturation_weight=0.1),
  flow=dict(t_sampling="stratified_logit_normal"),
)


def types_of(jaxpr) -> set[tuple[str, str]]:
  """Returns (primitive, type) of the arrays of a program; its scalars, such as the ends of ranges, may be wider."""
  found = {(e.primitive.name, str(x.aval.dtype)) for e in jaxpr.eqns for x in e.outvars if getattr(x.aval, "ndim", 0)}
  return found.union(*(types_of(inner) for e in jaxpr.eqns for inner in jax.extend.core.jaxprs_in_params(e.params)))


@pytest.mark.parametrize(
  "config",
  [
    config_of(**OPTIONS, optim=dict(name="muon", accumulate_steps=2)),
    tiny_generators.generator_config(condition="text"),
    vae_stage.config_of(),
  ],
  ids=lambda config: config.stage,
)
def test_64_bit_mode_changes_no_type(config):
  """With jax_enable_x64, state and metrics have the types that they have without, and no array is wider."""
  stage, optimizer, key = make_stage(config), optim.make_optimizer(config.optim, 10), jax.random.key(0)
  update = make_update(stage, optimizer, accumulate_steps=config.optim.accumulate_steps, decay=0.9)
  batch = inputs.abstract_batch(config, stage)
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)

  def trace():
    state = unbox(jax.eval_shape(functools.partial(init_state, stage, optimizer), key))
    program, results = jax.make_jaxpr(update, return_shape=True)(state, batch, key)
    return types(state), types(results), program.jaxpr

  *expected, _ = trace()
  with jax.enable_x64(True):
    *actual, program = trace()
  assert actual == expected
  assert not {found for found in types_of(program) if found[1] in ("float64", "int64", "uint64")}


def test_64_bit_mode_draws_the_same():
  """The loss of the same key is the same."""
  config = config_of(**OPTIONS)
  stage, key = make_stage(config), jax.random.key(0)
  params, batch = make_params(stage), {"image": np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)}
  loss = lambda: float(jax.jit(stage.loss_fn)(params, batch, key, np.int32(1))[0])
  expected = loss()
  with jax.enable_x64(True):
    actual = loss()
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


# Devices (more: tests/parallel/test_sharding.py).


def test_batches_arrive_on_devices_complete_and_in_order():
  """The global arrays are the rows of one process, or of two together, for any prefetching."""
  config = config_of()
  given = dict(data=inputs.image_data(config), global_batch=config.data.global_batch, image_size=16, seed=0)
  whole = pipeline.train_batches(**given)
  halves = [pipeline.train_batches(**given, process_index=i, process_count=2) for i in (0, 1)]
  placed = sharding.device_batches(whole, sharding.batch_sharding(sharding.make_mesh()))
  for _ in range(3):
    batch, parts = next(placed), [next(half) for half in halves]
    for name, array in batch.items():
      np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
      assert len(array.sharding.device_set) == 8
  numbers = ({"x": np.full(8, i)} for i in range(5))
  placed = sharding.device_batches(numbers, sharding.batch_sharding(sharding.make_mesh()), ahead=3)
  assert [int(batch["x"][0]) for batch in placed] == [0, 1, 2, 3, 4]
