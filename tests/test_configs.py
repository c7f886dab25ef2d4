"""All configs and what they build (shapes only), config files, package metadata, and the shipped models."""

import ast
import functools
import importlib.metadata
import itertools
import re
import runpy
import sys

from flax.core.meta import unbox
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest
import setuptools

import flextok_jax
from flextok_jax import config as common
from flextok_jax import stages
from flextok_jax.configs import shapes
from flextok_jax.data import pipeline
from flextok_jax.evals import from_config
from flextok_jax.inference import decoding
from flextok_jax.stages import repa
from flextok_jax.training import inputs, optim
from flextok_jax.training.warm_start import check_params
from flextok_jax.weights import fingerprints, loading
from tests.conftest import ROOT
from tests.support.configs import SPECS, parse

SIZES = {  # millions of parameters with the VAE, as published; those count the fixed position tables too
  "flextok:d12_d12_in1k": 341.7,
  "flextok:d18_d18_in1k": 949.7,
  "flextok:d18_d28_in1k": 2540.9,
  "flextok:d18_d28_dfn": 2540.9,
  "vae:c4": 83.8,
  "vae:c8": 83.8,
  "vae:c16": 83.8,
}
AR_SIZES = {  # millions of parameters in the blocks, as published
  "ar:49m": 49,
  "ar:85m": 85,
  "ar:201m": 201,
  "ar:393m": 393,
  "ar:679m": 679,
  "ar:1b3": 1327,
  "ar:113m": 113,
  "ar:382m": 382,
  "ar:1b": 1152,
  "ar:3b": 3058,
}
SMALL = {"ablation_nested", "debug", "digits", "glyphs", "loader", "shapes", "shapes_ar"}
ASSETS = ROOT / "flextok_jax" / "assets"


@pytest.fixture(params=SPECS)
def name(request):
  return request.param


def flat(config):
  return flatten_dict(config.to_dict(), sep=".")


@functools.cache
def _shapes(config):
  return loading.abstract_params(config)


def joined_shapes(config):
  """Returns the shapes of the parameters, which depend on neither data, training, evaluation nor sampling."""
  defaults = common.derive(sampler=dict(guidance="none", num_steps=1)).to_dict()  # as students need
  other = ("data", "optim", "train", "eval", "sampler")
  return dict(_shapes(FrozenConfigDict(config.to_dict() | {name: defaults[name] for name in other})))


def count(params):
  return sum(x.size for x in jax.tree.leaves(params))


def test_all_configs_are_listed():
  assert set(SIZES) | set(AR_SIZES) | SMALL <= set(SPECS)
  assert {"shapes:coarse", "shapes_ar:stop"} < set(SPECS)


def test_has_all_config_fields_and_is_locked(name):
  config = parse(name)
  assert flat(config).keys() == flat(common.get_config()).keys()
  assert config.is_locked and config.data.sources.folder.is_locked


def test_only_known_fields_can_be_overridden(name):
  assert parse(name, "--config.optim.learning_rate=0.5").optim.learning_rate == 0.5
  for section, field in (("optim.", "lerning_rate"), ("", "extra")):
    with pytest.raises((KeyError, AttributeError), match=field):
      parse(name, f"--config.{section}{field}=0.5")


def test_settings_are_consistent(name):
  c = parse(name)
  assert c.data.global_batch % (8 * c.optim.accumulate_steps) == 0
  assert 0 < c.optim.warmup_steps < c.train.num_steps and c.train.log_every <= c.train.num_steps
  assert 0 < c.train.checkpoint_every <= c.train.num_steps
  assert c.train.keep_period % c.train.checkpoint_every == 0
  schedule = optim.make_schedule(c.optim, c.train.num_steps)
  assert float(schedule(c.optim.warmup_steps)) == pytest.approx(c.optim.learning_rate)
  weights = {key: source.weight for key, source in c.data.sources.items()}
  assert sum(weights.values()) == pytest.approx(1)
  for source in c.eval.sources:
    assert weights[source] > 0  # evaluation sources are also trained on
  decoding.token_counts(c.eval.num_tokens, c.tokens.num_registers)


def token_batch(c):
  """Returns shapes of a batch of two sequences."""
  of = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((2, *shape), dtype)
  batch = dict(token_ids=of(c.ar.num_tokens), length=of(), label=of())
  if c.ar.condition == "text":
    features = dict(text_features=of(c.text.max_length, c.text.features, dtype=jnp.dtype(c.dtype)))
    batch |= dict(text_lengths=of(), **(features if c.text.encoder == "t5" else {"text_ids": of(c.text.max_length)}))
  return batch


def test_builds_loss_and_predictions(name):
  """Shapes only: all sizes fit, patches divide the latents, and settings have known names."""
  c = parse(name)
  stage, params = stages.make_stage(c), joined_shapes(c)
  images = jax.ShapeDtypeStruct((2, c.image_size, c.image_size, 3), jnp.uint8)
  batch = token_batch(c) if c.stage == "ar" else {"image": images}
  if repa.section(c) is not None:
    batch["teacher"] = jax.ShapeDtypeStruct((2, repa.teacher_grid(c) ** 2, c.repa.features), jnp.bfloat16)
  for parts in jax.eval_shape(stage.init_auxiliary, jax.random.key(0)):
    params |= unbox(parts)
  loss, _ = jax.eval_shape(stage.loss_fn, params, batch, jax.random.key(0), jnp.int32(0))
  assert loss.shape == () and loss.dtype == jnp.float32
  predict = stage.predict_fns
  if c.stage == "ar":
    assert jax.eval_shape(predict["token_losses"], params, batch)[0].shape == (2, c.ar.num_tokens)
    return
  if c.stage == "vae":
    recon = jax.eval_shape(predict["reconstruct"], params, images)
  else:
    ids = jax.eval_shape(predict["tokenize"], params, images)
    assert ids.shape == (2, c.tokens.num_registers) and ids.dtype == jnp.int32
    keep_k, keys = jax.ShapeDtypeStruct((2,), jnp.int32), jax.random.split(jax.random.key(0), 2)
    recon = jax.eval_shape(predict["detokenize"], params, ids, keep_k, keys)
  assert recon.shape == images.shape and recon.dtype == jnp.float32


@pytest.mark.parametrize("name", sorted(SIZES))
def test_published_sizes(name):
  params = joined_shapes(parse(name))
  assert count(params) == pytest.approx(SIZES[name] * 1e6, rel=0.01)
  assert count(params["vae"]) == pytest.approx(83.8e6, rel=0.01)


@pytest.mark.parametrize("name", sorted(AR_SIZES))
def test_published_sizes_of_generators(name):
  c, params = parse(name), joined_shapes(parse(name))
  assert count(params["ar"]["blocks"]) == pytest.approx(AR_SIZES[name] * 1e6, rel=0.015)
  assert ("text_mlp" in params) == (c.ar.condition == "text") and "t5" not in params
  assert params["ar"]["readout"]["kernel"].shape == (c.ar.width, 64_000)


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_a_trained_vae_fits_a_tokenizer_on_top(channels, tmp_path):
  """The arrays that vae:cN trains are those that a tokenizer with N latent channels starts from."""
  vae = joined_shapes(parse(f"vae:c{channels}"))
  tokenizer = joined_shapes(parse("flextok:d12_d12_in1k", f"--config.vae.latent_channels={channels}"))
  check_params(vae, {"vae": tokenizer["vae"]}, "the VAE")


@pytest.mark.parametrize("name", sorted(SIZES))
def test_vae_is_float32_when_frozen_and_bfloat16_when_trained(name):
  c = parse(name)
  assert (c.dtype, c.vae.dtype) == ("bfloat16", "bfloat16" if c.stage == "vae" else "float32")


def test_dfn_folder_is_required():
  data = inputs.image_data(parse("flextok:d18_d28_dfn"))
  for read in (
    lambda: pipeline.eval_set(data, "folder", image_size=256, num_images=1),
    lambda: pipeline.train_batches(data, global_batch=8, image_size=256, seed=0),
  ):
    with pytest.raises(ValueError, match="set data.sources.folder.path to a folder"):
      read()


def test_both_runs_of_a_tokenizer_share_one_model():
  whole = shapes.get_config()
  from_config.check_same_model(shapes.get_config("coarse"), whole)
  assert flat(whole) == flat(shapes.get_config(""))
  with pytest.raises(ValueError, match="config shapes takes no argument or one of coarse.*got 'coars'"):
    shapes.get_config("coars")


# Config files.


@pytest.mark.parametrize("file", ["flextok", "vae", "ar"])
def test_a_config_family_lists_its_members(file):
  members = [name.partition(":")[2] for name in (*SIZES, *AR_SIZES) if name.startswith(file + ":")]
  for spec in (file, f"{file}:none"):
    with pytest.raises(ValueError, match=f"config {file} takes one of .*; got '{spec.partition(':')[2]}'") as error:
      common.load_config(spec)
    assert all(re.search(rf"\b{member}\b", str(error.value)) for member in members)


def test_config_names_and_paths_work_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert flat(common.load_config("shapes:coarse")) == flat(common.load_config(f"{ROOT}/configs/shapes.py:coarse"))
  (tmp_path / "debug.py").write_text(
    "from flextok_jax.configs import debug\n\n\ndef get_config(seed='1'):\n  c = debug.get_config()\n"
    "  c.seed = int(seed)\n  return c\n"
  )
  assert [common.load_config(spec).seed for spec in ("debug", "debug.py", "./debug.py:7")] == [0, 1, 7]
  assert parse("debug.py:7", "--config.image_size=32").image_size == 32


@pytest.mark.parametrize(
  "text, spec, error, pattern",
  [
    ("", "file", FileNotFoundError, "no config 'file': one of .*debug, .*flextok, .*or the path of a file"),
    ("", "none.py", FileNotFoundError, "the config file none.py does not exist"),
    ("", "file.py", ValueError, "file.py has no get_config()"),
    ("def get_config(:", "file.py", ValueError, "config file file.py: SyntaxError: .*"),
    ("import nothing_such", "file.py", ValueError, "config file file.py: ModuleNotFoundError: .*nothing_such"),
    ("get_config = lambda: 1 / 0", "file.py", ValueError, "get_config.. of file.py: ZeroDivisionError"),
    ("get_config = lambda: {}", "file.py", ValueError, "get_config.. of file.py must return a ConfigDict, got {}"),
    ("get_config = lambda: 0", "file.py:x", ValueError, "config file.py takes no argument, got 'x'"),
    ("get_config = lambda arg: 0", "file.py", ValueError, "config file.py takes an argument"),
    ("", "debug:x", ValueError, "config debug takes no argument, got 'x'"),
  ],
)
def test_invalid_config_files(text, spec, error, pattern, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file.py").write_text(text)
  with pytest.raises(error, match=pattern):
    common.load_config(spec)


# Shipped models.


@pytest.mark.parametrize(
  "asset, spec, tokenizer",
  [
    ("glyphs", "glyphs:next", ""),
    ("glyphs_student", "distill:glyphs", "glyphs"),
    ("glyphs_groups", "glyphs:groups", "glyphs"),
    ("glyphs_text", "glyphs:text", "glyphs"),
    ("shapes", "shapes", ""),
    ("shapes_student", "distill:shapes", "shapes"),
    ("shapes_ar", "shapes_ar", "shapes"),
    ("shapes_ar_stop", "shapes_ar:stop", "shapes"),
    ("shapes_grid", "shapes:grid", ""),
    ("shapes_grid_ar", "shapes_ar:text", "shapes_grid"),
  ],
)
def test_shipped_models(asset, spec, tokenizer):
  path = ASSETS / f"{asset}.safetensors"
  assert path.stat().st_size < 10e6
  config, params = loading.load(str(path))
  check_params(params, joined_shapes(config), path.name)
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
  expected = parse(spec)
  if tokenizer:
    named = loading.load(str(ASSETS / f"{tokenizer}.safetensors"))
  if config.stage == "distill":
    assert config.distill.teacher == fingerprints.tokenizer(*named, decoder=True)
    assert fingerprints.tokenizer(config, params) == fingerprints.tokenizer(*named)
  if config.stage == "ar":  # fields that describe the tokenizer of its ids are taken from the token shards
    assert config.ar.tokenizer == fingerprints.tokenizer(*named)
    expected.ar.tokenizer = config.ar.tokenizer
  from_config.check_same_model(expected, config)
  assert flat(config).keys() <= flat(expected).keys()  # fields may be added but not renamed


@pytest.fixture(scope="module")
def declared():
  """Returns the arguments that setup.py passes to setuptools."""
  given = {}
  original, setuptools.setup = setuptools.setup, lambda **kwargs: given.update(kwargs)
  try:
    runpy.run_path(str(ROOT / "setup.py"))
  finally:
    setuptools.setup = original
  return given


def pins():
  """Returns {distribution: version} from requirements.txt."""
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
  exact = {}
  for requirement in parsed:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, requirement
    exact[canonicalize_name(requirement.name)] = specifier.version
  assert len(exact) == len(parsed)  # no duplicates
  return exact


def test_pins_satisfy_declared_ranges(declared):
  pinned = pins()
  assert declared["python_requires"] == ">=3.11"
  for line in (*declared["install_requires"], *declared["extras_require"]["test"]):
    requirement = Requirement(line)
    assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert not any(s.operator in ("<", "<=", "==", "~=") for s in requirement.specifier)  # no upper bounds


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the pins are for Python 3.11")
def test_pins_are_complete(declared):
  """Every requirement of a pinned distribution, for this platform and its requested extras, is pinned and satisfied."""
  pinned, seen = pins(), set()
  todo = [Requirement(line) for line in (*declared["install_requires"], *declared["extras_require"]["test"])]
  while todo:
    requirement = todo.pop()
    key = canonicalize_name(requirement.name), frozenset(requirement.extras)
    if key in seen:
      continue
    seen.add(key)
    assert pinned[key[0]] in requirement.specifier, requirement
    for line in importlib.metadata.requires(requirement.name) or ():
      needed = Requirement(line)
      extras = requirement.extras or {""}
      if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
        todo.append(needed)
  assert {name for name, _ in seen} == pinned.keys()  # and no others are pinned


def test_every_import_is_declared(declared):
  """The package imports only what setup.py declares, and optional packages only through extras.require."""
  extras = (*itertools.chain(*declared["extras_require"].values()), "flextok-jax", "tensorflow")  # by tensorflow-cpu
  names = {canonicalize_name(Requirement(line).name) for line in (*declared["install_requires"], *extras)}
  providers = importlib.metadata.packages_distributions()
  used = set()
  for path in (ROOT / "flextok_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        used |= {alias.name.partition(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        used.add(node.module.partition(".")[0])
  used -= sys.stdlib_module_names | {"flextok_jax"}
  assert "jax" in used and "tensorflow" in used
  for module in used:
    given = {canonicalize_name(d) for d in providers.get(module, (module,))}  # if not installed, the module's own name
    assert given & names, f"{module} comes from {given}, which setup.py does not name"


def test_version_and_packages(declared):
  assert declared["version"] == flextok_jax.__version__
  folders = {path.parent.relative_to(ROOT) for path in (ROOT / "flextok_jax").rglob("*.py")}
  assert set(declared["packages"]) == {".".join(folder.parts) for folder in folders} | {"flextok_jax.configs"}
