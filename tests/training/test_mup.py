"""muP: which parameter belongs where, how its updates scale, and that activations then change alike at all widths."""

import functools
import json

from flax.core.meta import unbox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from flextok_jax import mup_check
from flextok_jax.stages import make_stage
from flextok_jax.training import mup, optim
from tests.support import token_shards
from tests.support.commands import fails, run
from tests.support.configs import SPECS, parse
from tests.training.test_update import config_of

WIDE = {"embed", "mlp", "heads", "head_dim", "modulation", "embed_out"}  # axes that grow with the width


@functools.cache
def boxed_params(name):
  """The trained parameters of an experiment, boxed shapes by path."""
  params, _ = jax.eval_shape(make_stage(parse(name)).init, jax.random.key(0))
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return {tuple(mup.names_of(path)): box for path, box in jax.tree.leaves_with_path(params, is_leaf=is_box)}


def structure(name):
  """What decides which parameters an experiment has, and not how large they are."""
  c = parse(name)
  parts = {"ar": (c.ar, c.text), "vae": ()}.get(c.stage, (c.encoder, c.decoder))
  flat = [(key, value) for part in parts for key, value in sorted(part.items()) if isinstance(value, str | bool)]
  return c.stage, tuple(flat)


def test_every_parameter_of_every_config_has_the_group_that_its_axes_say():
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
      elif path[0] == "text_mlp":  # of the sizes of config.text
        assert group == "input", where
      else:
        ends = axes[0] in WIDE, axes[-1] in WIDE
        assert group == {(True, True): "hidden", (True, False): "readout", (False, True): "input"}[ends], where
      if group == "hidden":
        assert mup.width(path, box.value.shape) == box.value.shape[box.names.index("embed")], where
  assert found == set(mup.GROUPS)


@pytest.mark.parametrize("name, power", [("adamw", 1.0), ("muon", 0.5)])
def test_updates_scale_by_the_own_width_and_decay_does_not(name, power):
  """An encoder twice and a decoder four times as wide as the base: against the same optimiser without muP."""
  config = config_of(encoder=dict(depth=2), decoder=dict(width=64))
  rng = np.random.default_rng(0)
  shapes = unbox(jax.eval_shape(make_stage(config).init, jax.random.key(0))[0])
  grads = jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), shapes)
  zeros, ones = (jax.tree.map(lambda x, make=make: make(x.shape, np.float32), shapes) for make in (np.zeros, np.ones))

  def updates(base_width):
    choices = dict(name=name, mup_base_width=base_width, learning_rate=0.5, warmup_steps=0, weight_decay=0.1, eps=1e-16)
    optimizer = optim.make_optimizer(config_of(optim=choices).optim, 100)
    step = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])
    return step(grads, zeros), step(zeros, ones)  # of directions alone, and of decay alone

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
def test_one_step_changes_what_a_matrix_puts_out_alike_at_all_widths(name, slope):
  """The gradient of a matrix for one input x is x's outer product with what comes back: dy = x dW.

  Under Adam dW is its sign, and dy grows as the width; orthogonalised and at Adam's size, as its root.
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


def test_eps_means_the_same_at_all_widths():
  """A gradient as small as eps that falls with the width: under muP it moves a bias alike."""

  def change(width):
    params = {"encoder": {"head": {"bias": jnp.zeros(3)}, "adaln": {"head": {"kernel": jnp.zeros((width, 2))}}}}
    optimizer = optim.make_optimizer(config_of(optim=dict(mup_base_width=32, warmup_steps=0)).optim, 100)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 32 / width * 1e-8), params)
    return optimizer.update(grads, optimizer.init(params), params)[0]["encoder"]["head"]["bias"]

  np.testing.assert_allclose(change(32), np.full(3, -1e-3 / 2), rtol=1e-3)  # of debug's learning rate, halved by eps
  np.testing.assert_allclose(change(128), change(32), rtol=1e-5)


# The command.


CONFIG = """
from flextok_jax import config as common

def get_config():
  return common.derive(
      stage="ar", dtype="float32",
      ar=dict(width=32, depth=2, head_dim=16, num_ids=IDS, num_tokens=TOKENS, num_classes=3),
      data=dict(tokens=SHARDS, global_batch=16, num_threads=2, prefetch=1), optim=dict(learning_rate=1e-4))
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  """A generator of pictures' tokens, class-conditional."""
  root = tmp_path_factory.mktemp("mup")
  token_shards.write(root / "shards", token_shards.config(token_shards.make_pictures(root / "pictures")), num_shards=1)
  text = CONFIG
  for name, value in dict(IDS=token_shards.IDS, TOKENS=token_shards.TOKENS, SHARDS=str(root / "shards")).items():
    text = text.replace(name, repr(value))
  (root / "config.py").write_text(text)
  return root / "config.py"


def test_activations_change_alike_at_all_widths_under_mup_alone(config_file, tmp_path, capsys):
  run(mup_check, f"--config={config_file}", "--widths=512,64", "--steps=4", f"--out={tmp_path / 'new' / 'folder'}")
  out = tmp_path / "new" / "folder"
  report = json.loads((out / "coordinates.json").read_text())
  layers = {"ar/readout", *(f"ar/blocks/{i}{part}" for i in range(2) for part in ("", "/attention", "/mlp"))}
  slopes = report["slopes"]
  assert set(slopes["mup"]) == set(slopes["standard"]) == layers
  assert all(abs(slope) < 0.2 for slope in slopes["mup"].values()), slopes
  assert all(slope > 0.4 for slope in slopes["standard"].values()), slopes

  rows = {(row["kind"], row["width"], row["step"]): row for row in report["rows"]}
  assert set(rows) == {(kind, width, step) for kind in mup_check.KINDS for width in (64, 512) for step in range(5)}
  for (_, width, step), row in rows.items():
    assert set(row["mean_abs"]) == set(row["mean_change"]) == layers
    assert all((change > 0) == (step > 0) for change in row["mean_change"].values())
    if width == report["base_width"] == 64:  # where muP changes nothing
      assert row["mean_abs"] == pytest.approx(rows["standard", width, step]["mean_abs"], rel=1e-3)
  picture = np.asarray(Image.open(out / "coordinates.png").convert("RGB"))
  assert picture.shape[0] > 500 and picture.std() > 10
  printed = capsys.readouterr().out
  assert "ar/blocks/1/mlp" in printed and str(out / "coordinates.png") in printed


def test_bad_input_is_one_line(config_file, tmp_path):
  given, out = f"--config={config_file}", f"--out={tmp_path / 'out'}"
  fails("give --config=NAME and --out=DIR", mup_check, given)
  fails("give --config=NAME and --out=DIR", mup_check, out)
  for widths in ("64", "64,64", "64,wide", "0,64", "64,-128", ""):
    fails(f"--widths={widths} must be two or more widths, like 64,128,256", mup_check, given, out, f"--widths={widths}")
  fails("ar.width 24 is not a multiple of ar.head_dim 16", mup_check, given, out, "--widths=24,32")
  fails("--steps=0 must be at least 1", mup_check, given, out, "--steps=0")
  for fields, words in (
    ('stage="vae"', "stage 'vae' has no width: muP is of stages 'tokenizer' and 'ar'"),
    ('data=dict(latents="there")', "the check looks at images: it takes no config.data.latents=there"),
  ):
    (tmp_path / "other.py").write_text(
      f"from flextok_jax import config as common\nget_config = lambda: common.derive({fields})\n"
    )
    fails(words, mup_check, f"--config={tmp_path / 'other.py'}", out)
  assert not (tmp_path / "out").exists()
