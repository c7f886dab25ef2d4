"""Optimisers, their schedule, and checks of their settings."""

import re

from flax.core.meta import unbox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flextok_jax.stages import make_stage
from flextok_jax.training import optim
from tests.support.runs import config_of


def test_only_kernels_have_weight_decay():
  """A step with zero gradients moves only decayed parameters, by learning rate * decay."""
  stage = make_stage(config_of())
  params = jax.tree.map(lambda x: jnp.ones(x.shape), unbox(jax.eval_shape(stage.init, jax.random.key(0))[0]))
  settings = config_of(optim=dict(learning_rate=0.5, warmup_steps=0, weight_decay=0.2)).optim
  optimizer = optim.make_optimizer(settings, 100)
  step = lambda params: optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]
  updates = jax.jit(step)(params)
  names = set()
  for path, x in jax.tree_util.tree_leaves_with_path(updates):
    expected = -0.5 * 0.2 if path[-1].key == "kernel" else 0
    np.testing.assert_allclose(x, np.full(x.shape, expected), rtol=1e-6, err_msg=jax.tree_util.keystr(path))
    names.add(path[-1].key)
  assert names >= {"kernel", "bias", "registers", "mask_token", "null_token", "register_positions"}


def test_rates_scale_the_updates_of_their_part():
  params = unbox(jax.eval_shape(make_stage(config_of()).init, jax.random.key(0))[0])
  params = jax.tree.map(lambda x: jnp.ones(x.shape), params)

  def first_step(rates):
    optimizer = optim.make_optimizer(config_of(optim=dict(warmup_steps=0, rates=rates)).optim, 100)
    return jax.jit(lambda p: optimizer.update(p, optimizer.init(p), p)[0])(params)

  plain, scaled = first_step({}), first_step(dict(encoder=0.25))
  np.testing.assert_equal(jax.device_get(scaled["decoder"]), jax.device_get(plain["decoder"]))
  quarter = jax.tree.map(lambda x: np.asarray(x) * np.float32(0.25), plain["encoder"])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scaled["encoder"], quarter)


def test_muon_orthogonalises_block_matrices_and_uses_adam_for_the_rest():
  """Compared with singular value decompositions, for each layer and separately for queries, keys, values and gates."""
  stage = make_stage(config_of())
  rng = np.random.default_rng(0)
  params = unbox(jax.eval_shape(stage.init, jax.random.key(0))[0])
  params, grads = (jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), params) for _ in range(2))
  choices = dict(learning_rate=0.5, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)

  def first_step(name):
    optimizer = optim.make_optimizer(config_of(optim=dict(choices, name=name)).optim, 100)
    return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads)

  matrices = 0
  for (path, update), grad, adam in zip(
    jax.tree_util.tree_leaves_with_path(first_step("muon")),
    *map(jax.tree.leaves, (grads, first_step("adamw"))),
    strict=True,
  ):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not name.endswith("kernel") or "transformer" not in name:
      # Adam's first step is the gradient's sign; with Nesterov momentum almost twice that.
      np.testing.assert_array_equal(np.sign(update), np.sign(adam), err_msg=name)
      assert np.abs(update).max() < 1.1 * 0.5 * 1.9, name
      continue
    pairs = [(np.asarray(update), grad)]
    if "blocks" in name:
      pairs = [pair for both in pairs for pair in zip(*both)]
    if "qkv" in name:
      pairs = [pair for both in pairs for pair in zip(*(np.moveaxis(x, 1, 0) for x in both))]
    for u, g in pairs:
      inputs = int(np.prod(g.shape[:-1])) if "out" in name else g.shape[0]
      u, g = u.reshape(inputs, -1), g.reshape(inputs, -1)
      left, values, right = np.linalg.svd(g.astype(np.float64), full_matrices=False)
      values /= np.linalg.norm(values)
      for _ in range(5):  # quintic Newton-Schulz: all but the smallest approach 1
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
      assert 0.7 < np.median(values) < 1.2
      scale = -0.5 * 0.2 * np.sqrt(max(u.shape))  # Adam's steps have a root mean square of about 0.2 of the rate
      np.testing.assert_allclose(u / scale, (left * values) @ right, atol=1e-4, err_msg=name)
      matrices += 1
  c = config_of()
  assert matrices == (c.encoder.depth + c.decoder.depth) * (3 + 1 + 2 + 1)


def test_gradients_are_clipped_by_their_global_norm():
  settings = config_of(optim=dict(clip_norm=0.5, b1=0.0, weight_decay=0.0)).optim
  optimizer, params = optim.make_optimizer(settings, 10), {"kernel": jnp.zeros(4), "bias": jnp.zeros(3)}
  grads = {"kernel": jnp.full(4, 30.0), "bias": jnp.full(3, -40.0)}
  _, state = optimizer.update(grads, optimizer.init(params), params)
  (moments,) = (s.mu for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
  np.testing.assert_allclose(optax.global_norm(moments), 0.5, rtol=1e-5)  # with b1 = 0 the clipped gradient
  np.testing.assert_allclose(moments["kernel"][0] / moments["bias"][0], -0.75, rtol=1e-5)


def test_schedule():
  settings = config_of(optim=dict(learning_rate=1.0, warmup_steps=10, end_learning_rate=0.1)).optim
  schedule = optim.make_schedule(settings, 110)
  values = np.array([schedule(i) for i in (0, 5, 10, 60, 110, 200)])
  np.testing.assert_allclose(values, [0, 0.5, 1, 0.55, 0.1, 0.1], atol=1e-6)
  for num_steps in (1, 5, 10, 11):  # also shorter than the warm-up
    assert np.isfinite([optim.make_schedule(settings, num_steps)(i) for i in range(13)]).all()


def settings_of(num_steps=100_000, **overrides):
  return config_of(optim=dict(dict(ema_decay=0.9999), **overrides), train=dict(num_steps=num_steps))


def check(config):
  """Returns the warnings about the settings of a run that trains all parts."""
  return optim.check(config, ("encoder", "decoder"))


def test_usual_settings_give_no_warnings():
  assert check(settings_of()) == []
  assert check(settings_of(mup_base_width=32)) == []  # the width of both halves


@pytest.mark.parametrize(
  "overrides, words",
  [
    (dict(learning_rate=0.06), "learning_rate=0.06 is over 100 times above the usual, .* about 0.0005 with adamw"),
    (dict(learning_rate=4e-6), "learning_rate=4e-06 is over 100 times below"),
    (dict(warmup_steps=100_000), "warmup_steps=100000 is not below train.num_steps=100000: .* only rises"),
    (dict(ema_decay=0.999995), "ema_decay=0.999995 averages 200000 steps, the run has train.num_steps=100000"),
  ],
)
def test_unusual_settings_give_one_line_warnings(overrides, words):
  (line,) = check(settings_of(**overrides))
  assert re.search(words, line) and line.startswith("optim.") and "\n" not in line


def test_readouts_inconsistent_with_mup():
  config = settings_of(mup_base_width=16)
  config.decoder.update(width=64, readout_multiplier=0.25)
  (line,) = check(config)
  expected = "encoder.readout_multiplier=0.5 (mup_base_width / encoder.width), got 1"
  assert line == f"optim.mup_base_width=16 goes with {expected}"
  config.encoder.readout_multiplier = 0.5
  assert check(config) == []
  config = settings_of(mup_base_width=16)
  config.update(stage="ar", ar=dict(width=64))
  (line,) = check(config)
  assert "ar.readout_multiplier=0.25" in line
  config.stage = "vae"
  words = "optim.mup_base_width=16 is for transformers and stage 'vae' has no width: use 0"
  with pytest.raises(ValueError, match=words):
    check(config)
