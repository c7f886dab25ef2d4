"""Configs, states and outputs of small training runs; programs that several runs share."""

import contextlib
import functools
import json
from pathlib import Path
from unittest import mock

from flax.core.meta import unbox
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors

from flextok_jax import stages
from flextok_jax.config import flatten
from flextok_jax.configs import debug
from flextok_jax.stages import make_stage
from flextok_jax.training import loop, optim
from flextok_jax.training.state import TrainState, init_state


def config_of(**overrides) -> ConfigDict:
  """The debug config with overrides."""
  c = debug.get_config()
  c.update(overrides)
  return c


def random_state(config: ConfigDict, step: int = 3, seed: int = 0) -> TrainState:
  """Returns a train state of random numbers, including Adam's moments; its average differs from its parameters."""
  optimizer = optax.adam(1e-3)
  shapes = unbox(jax.eval_shape(lambda key: init_state(make_stage(config), optimizer, key), jax.random.key(0)))
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) if x.dtype == jnp.float32 else rng.integers(9), x.dtype)
  return jax.tree.map(draw, shapes).replace(step=jnp.int32(step))


@contextlib.contextmanager
def programs_shared():
  """Runs inside whose model, loss and optimiser are the same trace and compile their programs once."""

  ignored = ("train.", "eval.", "data.", "init_from", "profile_steps")  # by stages

  def once(make):
    made = {}

    def cached(config, *args):
      fields = sorted(flatten(config).items())
      key = repr([(k, v) for k, v in fields if k == "train.parts" or not k.startswith(ignored)]), args
      if key not in made:
        made[key] = make(config, *args)
      return made[key]

    return cached

  with (
    mock.patch.object(stages, "make_stage", once(make_stage)),
    mock.patch.object(optim, "make_optimizer", once(optim.make_optimizer)),
    mock.patch.object(loop, "make_update", functools.cache(loop.make_update)),
    mock.patch.object(loop, "init_state", jax.jit(init_state, static_argnums=(0, 1))),
  ):
    yield


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def fails(pattern, fn, *args):
  """Asserts that a call raises an error of one short line."""
  with pytest.raises((ValueError, FileNotFoundError), match=pattern) as error:
    fn(*args)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600, str(error.value)


def files_of(folder) -> dict[Path, bytes]:
  """Returns {path: content} of all files below a folder."""
  return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def read_metrics(workdir):
  """Returns (training lines, evaluation lines) of a workdir."""
  lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  return [x for x in lines if "loss" in x], [x for x in lines if "loss" not in x]


def read_checkpoint(workdir, step, name):
  return ocp.StandardCheckpointer().restore(Path(workdir).absolute() / "checkpoints" / str(step) / name)


def checkpoint_steps(workdir):
  return sorted(int(path.name) for path in (Path(workdir) / "checkpoints").iterdir())


def step_of_weights(workdir):
  with safetensors.safe_open(Path(workdir) / "weights.safetensors", "numpy") as f:
    return f.metadata()["flextok_jax.step"]
