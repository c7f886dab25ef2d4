"""Training some parts of a model: the others stay as loaded, and cost neither gradients nor optimizer state."""

import shutil

import jax
import numpy as np
import pytest

from flextok_jax.core import flops
from flextok_jax.stages import make_stage
from flextok_jax.training import checkpoint, goodput, loop, optim
from flextok_jax.training.state import ema_decay, init_state
from flextok_jax.weights import loading, saving
from tests.support.runs import assert_trees_equal, config_of, fails, read_checkpoint
from tests.support.tiny import make_params

pytestmark = pytest.mark.usefixtures("shared_programs")

TRAIN = dict(num_steps=4, log_every=2, checkpoint_every=2, eval_every=4, keep_checkpoints=9, export_dtype="float32")


class NoEvaluation:
  """An evaluation that measures nothing."""

  scalars: dict = {}
  run = lambda self, params: self
  write = lambda self, folder: []
  table = lambda self: ""


def train(config, workdir):
  loop.train(config, str(workdir), lambda *args: (NoEvaluation(), lambda params: {}))


def bytes_of(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def state_of(config):
  optimizer = optim.make_optimizer(config.optim, 10)
  return jax.eval_shape(lambda key: init_state(make_stage(config), optimizer, key), jax.random.key(0))


def tuned(**settings):
  return config_of(**{"train": TRAIN | {"parts": ("decoder",)}, **settings})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """Weights to start from, and their path."""
  path = tmp_path_factory.mktemp("base") / "weights.safetensors"
  params = make_params(make_stage(config_of()))
  saving.save_weights(path, config_of(), params)
  return params, str(path)


def resumed(workdir, config, tmp_path):
  """The workdir of the same run, resumed from its checkpoint of step 2."""
  other = shutil.copytree(workdir, tmp_path / "resumed", ignore=shutil.ignore_patterns("4", "weights.safetensors"))
  train(config, other)
  return other


def test_a_run_of_the_decoder_keeps_the_encoder(base, tmp_path):
  params, path = base
  config = tuned(init_from=path)
  train(config, tmp_path / "run")
  assert_trees_equal(read_checkpoint(tmp_path / "run", 4, "frozen"), {"encoder": params["encoder"]})
  average = read_checkpoint(tmp_path / "run", 4, "ema")
  assert set(average) == set(read_checkpoint(tmp_path / "run", 4, "params")) == {"decoder"}
  # Both ways to load the run give the whole model.
  for source in (tmp_path / "run", tmp_path / "run" / "weights.safetensors"):
    weights = loading.load(source)[1]
    assert_trees_equal(weights, {"encoder": params["encoder"], "decoder": average["decoder"]})
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), average["decoder"], params["decoder"])
  assert min(jax.tree.leaves(moved["transformer"])) > 0
  other = resumed(tmp_path / "run", config, tmp_path)
  for name in ("params", "ema", "opt_state"):
    assert_trees_equal(read_checkpoint(other, 4, name), read_checkpoint(tmp_path / "run", 4, name))
  fails("train.parts is .*'decoder'.* there and .* here", checkpoint.check_workdir, str(other), config_of(train=TRAIN))


def test_frozen_parts_cost_neither_gradients_nor_optimizer_state():
  size = config_of().data.global_batch
  full, decoder, encoder = (
    config_of(fast=False, train=dict(parts=parts)) for parts in ((), ("decoder",), ("encoder",))
  )
  # The backward pass of the encoder takes twice its forward pass, without a gradient of its input; and it needs that
  # of the codes that the decoder embeds.
  stage = make_stage(full)
  shapes, images = state_of(full).params, jax.ShapeDtypeStruct((size, 16, 16, 3), np.float32)
  forward = flops.count(lambda p, x: stage.model.apply({"params": p}, x, method="encode_registers"), shapes, images)
  embed = 2 * size * 16 * (4 * 4 * 3) * full.encoder.width
  codes = 2 * size * full.tokens.num_registers * len(full.tokens.levels) * full.decoder.width
  assert goodput.update_flops(full) - goodput.update_flops(decoder) == 2 * forward - embed + codes
  assert goodput.update_flops(encoder) < goodput.update_flops(full)  # through the decoder, but not of its weights
  for config, part in ((decoder, "decoder"), (encoder, "encoder")):
    state = state_of(config)
    assert set(state.params) == set(state.ema) == {part}
    moments = 2 * bytes_of(state.params)
    assert moments <= bytes_of(state.opt_state) <= moments + 64  # and counts of steps
  assert state_of(full).params.keys() == {"encoder", "decoder"} == state_of(decoder).joined().keys()


def test_the_average_soon_forgets_the_loaded_weights():
  """Their share of the average is 1e-7 after 20 steps, whatever optim.ema_decay is."""
  share = np.prod([float(ema_decay(0.9999, step)) for step in range(20)])
  assert share < 1e-6


def test_bad_parts(base, tmp_path):
  config = tuned(train=dict(parts=("decodr",)))
  fails("train.parts names the part 'decodr': the parts trained here are encoder, decoder$", make_stage, config)
  fails("train.parts must be a tuple", make_stage, config_of(train=dict(parts=(3,))))
  fails("train.parts names the part 'encoder': .* are decoder$", make_stage, config_of(
    stage="distill", decoder=dict(interval=True), sampler=dict(guidance="none"), train=dict(parts=("encoder",))
  ))  # fmt: skip
  fails("the frozen encoder needs trained weights: give config.init_from", train, tuned(), tmp_path)
  rates = tuned(optim=dict(rates=dict(encoder=0.1)))
  fails("optim.rates.encoder=0.1 has no effect, as the encoder is not trained", optim.check, rates)
