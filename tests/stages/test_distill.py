"""Stage "distill": the student against its teacher, its loss against numpy, runs, devices, bad input."""

import dataclasses
import functools

from flax.core import meta
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

from flextok_jax.config import with_fields
from flextok_jax.inference import tokenizer as api
from flextok_jax.models.tokenizer.flextok import Sampler, sample_latents, sample_path
from flextok_jax.ops import flow, fsq
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.stages.tokenizer import make_model
from tests.support.tiny import make_params, tiny_config

SAMPLER = dict(num_steps=5, guidance="cfg", guidance_scale=2.0)
STEPS = (1, 2, 4)


def student_config(**overrides):
  settings = dict(
    stage="distill", sampler=dict(num_steps=2, guidance="none"), distill=dict(steps=STEPS, sampler=SAMPLER)
  )
  config = tiny_config(**(settings | overrides))
  return with_fields(config, {"decoder.interval": True, "tokens.num_registers": 16, "tokens.nested_dropout": "pow2"})


@functools.cache
def built(fast=True):
  """Returns the stage and its parameters, of a student that is not its teacher."""
  stage = make_stage(student_config(fast=fast))
  params = make_params(stage)
  rng = np.random.default_rng(1)
  teacher = {k: v for k, v in params["decoder"].items() if k != "interval_embed"}
  teacher = jax.tree.map(lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32), teacher)
  return stage, {**params, "teacher": teacher}


LATENTS = np.random.default_rng(2).normal(size=(8, 16, 16, 3)).astype(np.float32)


def test_paths_are_piecewise_linear():
  rng = np.random.default_rng(0)
  path, t = rng.normal(size=(6, 4, 3)).astype(np.float32), np.float32([1.0, 0.0, 0.43, 0.8])
  expected = [[np.interp(1 - s, np.linspace(0, 1, 6), path[:, b, i]) for i in range(3)] for b, s in enumerate(t)]
  np.testing.assert_allclose(flow.on_path(path, t), expected, atol=1e-5)


@pytest.mark.parametrize("settings", [SAMPLER, dict(num_steps=4, guidance="apg", guidance_interval=(0.4, 0.8))])
def test_a_path_ends_where_the_sampler_does(settings):
  stage, params = built()
  sampler = Sampler(**{**student_config().distill.sampler.to_dict(), **settings})
  ids, keep_k = np.random.default_rng(3).integers(0, 200, (8, 16)), np.arange(1, 9, dtype=np.int32)

  @jax.jit
  def run(params):
    decoder = {"decoder": params["teacher"]}
    codes = fsq.ids_to_codes(ids, stage.model.levels)
    path = sample_path(stage.teacher, decoder, codes, keep_k, LATENTS, sampler, True)
    return path, sample_latents(stage.teacher, decoder, ids, keep_k, LATENTS, sampler)

  path, end = run(params)
  assert path.shape == (sampler.num_steps + 1, *LATENTS.shape)
  np.testing.assert_array_equal(path[0], LATENTS)
  np.testing.assert_array_equal(path[-1], end)


def test_an_untrained_student_is_its_teacher():
  """It starts as the teacher, whatever the length of its steps; its sampler has no unconditional pass."""
  stage, params = built()
  new = jax.device_get(jax.jit(lambda key: meta.unbox(stage.init(key)[0]))(jax.random.key(0)))
  start = stage.initial_weights({"decoder": params["teacher"], "encoder": params["encoder"]}, new)
  assert start["teacher"] is params["teacher"] and start["encoder"] is params["encoder"]
  sampler = dataclasses.replace(stage.sampler, num_steps=3)
  ids, keep_k = np.random.default_rng(3).integers(0, 200, (8, 16)), np.arange(1, 9, dtype=np.int32)
  sample = lambda model, decoder, fast: jax.jit(
    lambda decoder: sample_latents(model, {"decoder": decoder}, ids, keep_k, LATENTS, sampler, fast)
  )(decoder)
  expected = sample(stage.teacher, params["teacher"], True)
  for fast in (True, False):
    np.testing.assert_allclose(sample(stage.model, start["decoder"], fast), expected, atol=2e-5)
    other = sample(stage.model, params["decoder"] | {"time_embed": params["decoder"]["time_embed"]}, fast)
    assert np.abs(other - expected).max() > 1e-2
  with pytest.raises(ValueError, match="these weights are a student's: start from its teacher"):
    stage.initial_weights(start, new)


def test_the_loss_is_the_error_of_the_mean_velocity():
  """Against paths, own states and velocities computed step by step, with the stage's own draws."""
  stage, params = built()
  key = jax.random.key(4)
  loss, metrics = jax.jit(lambda p: stage.latents_loss(p, LATENTS, key))(params)
  draw_key, step_key = jax.random.split(key)
  rows = jax.device_get(stage._draw(jnp.asarray(LATENTS), draw_key))
  segment = jax.random.randint(step_key, (1, 8, len(STEPS)), 0, jnp.asarray(STEPS, jnp.int32), jnp.int32)[0]
  rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

  @jax.jit
  def paths_and_codes(params):
    codes = stage.model.apply({"params": params}, rows.latents, method="encode")
    teacher = {"decoder": params["teacher"]}
    return sample_path(stage.teacher, teacher, codes, rows.keep_k, rows.noise, stage.teacher_sampler, False), codes

  velocity = jax.jit(
    lambda params, *args, interval: stage.model.apply({"params": params}, *args, interval=interval, method="velocity")
  )
  path, codes = paths_and_codes(params)
  path, total = np.asarray(path, np.float64), {}
  for i, steps in enumerate(STEPS):
    knots, interval = np.linspace(0, 1, 6), np.full(8, 1 / steps, np.float32)
    x, states = rows.noise, []  # of the student's own sampler
    for j in range(steps):
      states.append(x)
      times = np.full(8, 1 - j / steps, np.float32)
      x = x - velocity(params, x, times, codes, rows.keep_k, np.zeros(8, bool), interval=interval) / steps
    start = np.float32(1 - segment[:, i] / steps)
    x_t = np.stack([states[j][b] for b, j in enumerate(segment[:, i])])
    ends = [1 - t + 1 / steps for t in start]
    x_r = np.stack(
      [
        np.apply_along_axis(lambda x, e=e, knots=knots: np.interp(e, knots, x), 0, path[:, b])
        for b, e in enumerate(ends)
      ]
    )
    u = velocity(params, np.float32(x_t), start, codes, rows.keep_k, np.zeros(8, bool), interval=interval)
    total[steps] = np.square(np.float64(u) - (x_t - x_r) * steps).mean((1, 2, 3)) / steps
    np.testing.assert_allclose(metrics[f"loss_n{steps}"][0], total[steps].sum(), rtol=1e-4)
    assert segment[:, i].min() >= 0 and segment[:, i].max() < steps
  np.testing.assert_allclose(loss, np.mean(list(total.values())), rtol=1e-4)
  by_length = [v for name, v in metrics.items() if name.startswith("loss_k")]
  np.testing.assert_allclose(sum(float(v[0]) for v in by_length), metrics["loss"][0], rtol=1e-5)
  assert sum(float(v[1]) for v in by_length) == 8


def test_buckets_have_the_plain_loss_and_gradients_reach_the_student_alone():
  results = []
  for fast in (True, False):
    stage, _ = built(fast)
    params = built()[1]
    grad = jax.value_and_grad(lambda p, stage=stage: stage.latents_loss(p, LATENTS, jax.random.key(5))[0])
    results.append(jax.jit(grad)(params))
  (loss, grads), (plain_loss, plain) = results
  np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
  for path, grad in flatten_dict(grads, sep="/").items():
    other = flatten_dict(plain, sep="/")[path]
    if path.startswith("decoder") and path != "decoder/null_token":  # there is no unconditional pass
      assert np.abs(other).max() > 0, path
      assert np.abs(grad - other).max() < 2e-5 * np.abs(other).max(), path
    else:
      assert not np.any(grad) and not np.any(other), path
  trained, frozen = jax.eval_shape(built()[0].init, jax.random.key(0))
  assert set(trained) == {"decoder"} and set(frozen) == {"encoder"}


def test_many_devices_compute_the_same_as_one():
  """Each holds whole groups of rows; its own states and paths are computed in the step."""
  config = with_fields(student_config(), {"tokens.bucket_rows": 2})
  stage, params = make_stage(config), built()[1]
  latents = np.random.default_rng(6).normal(size=(8, 16, 16, 3)).astype(np.float32)
  fn = jax.jit(jax.value_and_grad(lambda p, x: stage.latents_loss(p, x, jax.random.key(7))[0]))
  mesh = sharding.make_mesh(devices=jax.devices()[:4])
  spread = jax.device_put(latents, sharding.batch_sharding(mesh))
  everywhere = jax.device_put(params, sharding.replicated(mesh))
  (loss, grads), (one_loss, one) = jax.device_get((fn(everywhere, spread), fn(params, latents)))
  np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), grads["decoder"], one["decoder"]
  )


def test_a_student_decodes_without_guidance():
  stage, params = built()
  model = api.FlexTok({k: params[k] for k in ("encoder", "decoder")}, FrozenConfigDict(student_config()))
  ids = np.array([[1, 2, 3], [4, 5, 6]])
  images = model.detokenize(ids, key=jax.random.key(0), num_steps=1)
  assert images.shape == (2, 16, 16, 3)
  with pytest.raises(ValueError, match="guidance_scale=3.0 has no effect where guidance is 'none'"):
    model.detokenize(ids, key=jax.random.key(0), guidance_scale=3.0)
  with pytest.raises(ValueError, match="a student has no unconditional pass.*guidance must be 'none', got 'cfg'"):
    model.detokenize(ids, key=jax.random.key(0), guidance="cfg")
  with pytest.raises(ValueError, match="num_steps=5 is more than the 4 steps that this student was trained for"):
    model.detokenize(ids, key=jax.random.key(0), num_steps=5)
  with pytest.raises(ValueError, match="cannot be written as an official one: export its teacher"):
    model.to_official("student.safetensors")


def test_bad_configs():
  with pytest.raises(ValueError, match="stage 'distill' trains a student: set decoder.interval=True"):
    make_stage(with_fields(student_config(), {"decoder.interval": False}))
  with pytest.raises(ValueError, match="decoder.interval=True is for stage 'distill'"):
    make_stage(with_fields(student_config(), {"stage": "tokenizer"}))
  with pytest.raises(ValueError, match=r"distill.steps must be 1 to 8 whole numbers .*, got \(1, 1\)"):
    with_fields(student_config(), {"distill.steps": (1, 1)})
  assert make_model(student_config()).decoder.interval
