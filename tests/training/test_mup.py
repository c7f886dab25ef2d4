"""muP: groups of parameters, scaling of updates, and that activations then change equally at all widths."""

import functools

from flax.core.meta import unbox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.stages import make_stage
from flextok_jax.training import mup, optim
from tests.support.configs import SPECS, parse
from tests.support.runs import config_of

WIDE = {"embed", "mlp", "heads", "head_dim", "modulation", "embed_out"}  # axes that grow with the width


@functools.cache
def boxed_params(name):
  """Returns shapes of an experiment's trained parameters, with their axis names, by path."""
  params, _ = jax.eval_shape(make_stage(parse(name)).init, jax.random.key(0))
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return {tuple(mup.names_of(path)): box for path, box in jax.tree.leaves_with_path(params, is_leaf=is_box)}


def structure(name):
  """Returns what determines which parameters an experiment has, regardless of their sizes."""
  c = parse(name)
  parts = {"ar": (c.ar, c.text), "vae": ()}.get(c.stage, (c.encoder, c.decoder))
  flat = [(key, value) for part in parts for key, value in sorted(part.items()) if isinstance(value, str | bool)]
  return c.stage, tuple(flat)


def test_every_parameter_of_every_config_has_the_group_of_its_axes():
  found = set()
  for name in {structure(name): name for name in SPECS}.values():
    for path, box in boxed_params(name).items():
      axes, where = [axis for axis in box.names if axis != "layers"], f"{name}: {'/'.join(path)}"
      group = mup.group(path)
      found.add(group)
      if path[0] == "vae":
        assert group == "vae", where
      elif path[-1] != "kernel":
        assert group == "vector", where
      elif path[0] == "text_mlp":  # sized by config.text
        assert group == "input", where
      else:
        ends = axes[0] in WIDE, axes[-1] in WIDE
        assert group == {(True, True): "hidden", (True, False): "readout", (False, True): "input"}[ends], where
      if group == "hidden":
        assert mup.width(path, box.value.shape) == box.value.shape[box.names.index("embed")], where
  assert found == set(mup.GROUPS)


@pytest.mark.parametrize("name, power", [("adamw", 1.0), ("muon", 0.5)])
def test_updates_scale_with_the_width_and_decay_does_not(name, power):
  """The encoder is twice and the decoder four times as wide as the base; compared with the optimiser without muP."""
  config = config_of(encoder=dict(depth=2), decoder=dict(width=64))
  rng = np.random.default_rng(0)
  shapes = unbox(jax.eval_shape(make_stage(config).init, jax.random.key(0))[0])
  grads = jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), shapes)
  zeros, ones = (jax.tree.map(lambda x, make=make: make(x.shape, np.float32), shapes) for make in (np.zeros, np.ones))

  def updates(base_width):
    choices = dict(name=name, mup_base_width=base_width, learning_rate=0.5, warmup_steps=0, weight_decay=0.1, eps=1e-16)
    optimizer = optim.make_optimizer(config_of(optim=choices).optim, 100)
    step = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])
    return step(grads, zeros), step(zeros, ones)  # direction only, and decay only

  (standard, decay), (scaled, scaled_decay) = updates(0), updates(16)
  decayed = 0
  for (path, a), b, c, d in zip(
    jax.tree.leaves_with_path(scaled), *map(jax.tree.leaves, (standard, scaled_decay, decay)), strict=True
  ):
    names = mup.names_of(path)
    ratio = 1.0
    if mup.group(names) == "hidden":
      ratio = (16 / dict(encoder=32, decoder=64)[names[0]]) ** (power if "transformer" in names else 1)
    np.testing.assert_allclose(a, ratio * b, rtol=1e-4, atol=1e-6, err_msg="/".join(names))
    np.testing.assert_allclose(c, d, rtol=1e-5, err_msg="/".join(names))
    decayed += bool(np.any(c))
  assert decayed > 5


@pytest.mark.parametrize("name, slope", [("adamw", 1.0), ("muon", 0.5)])
def test_one_step_changes_outputs_of_a_matrix_equally_at_all_widths(name, slope):
  """The gradient of a matrix for one input x is the outer product of x and the output's gradient: dy = x dW.

  With Adam, dW is the sign of that, and dy grows linearly with the width; with Muon, as its square root.
  """
  rng = np.random.default_rng(0)

  def change(width, base_width):
    x, back = rng.normal(size=(2, width)).astype(np.float32)
    tree = lambda x: {"encoder": {"transformer": {"last": {"mlp": {"out": {"kernel": x}}}}}}
    choices = dict(name=name, mup_base_width=base_width, learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
    optimizer = optim.make_optimizer(config_of(optim=choices).optim, 100)
    params, grads = tree(jnp.zeros((width, width))), tree(jnp.outer(x, back))
    update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0])(grads)
    return np.sqrt(np.square(x @ jax.tree.leaves(update)[0]).mean())

  for base_width, expected in ((0, slope), (32, 0.0)):
    growth = np.log(change(256, base_width) / change(32, base_width)) / np.log(256 / 32)
    assert abs(growth - expected) < 0.12, (base_width, growth)


def test_eps_has_the_same_effect_at_all_widths():
  """A gradient of about eps that decreases with the width: with muP it moves a bias equally."""

  def change(width):
    params = {"encoder": {"head": {"bias": jnp.zeros(3)}, "adaln": {"head": {"kernel": jnp.zeros((width, 2))}}}}
    optimizer = optim.make_optimizer(config_of(optim=dict(mup_base_width=32, warmup_steps=0)).optim, 100)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 32 / width * 1e-8), params)
    return optimizer.update(grads, optimizer.init(params), params)[0]["encoder"]["head"]["bias"]

  np.testing.assert_allclose(change(32), np.full(3, -1e-3 / 2), rtol=1e-3)  # debug's learning rate, halved by eps
  np.testing.assert_allclose(change(128), change(32), rtol=1e-5)
