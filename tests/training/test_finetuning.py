"""Fine-tuning: frozen parts stay as loaded, and cost neither gradients nor optimizer state; LoRA."""

import shutil

from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np
import optax
import pytest

from flextok_jax.core import flops
from flextok_jax.stages import make_stage
from flextok_jax.training import checkpoint, goodput, loop, optim
from flextok_jax.training.state import ema_decay, init_state
from flextok_jax.weights import loading, saving
from tests.support.runs import assert_trees_equal, config_of, fails, read_checkpoint
from tests.support.tiny import latent_config, make_params

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


# LoRA.


def lora_state(config, seed=3):
  """Random parts of a train state, also of the factors: {part: parameters}."""
  state = unbox(state_of(config))
  rng = np.random.default_rng(seed)
  draw = lambda x: jax.numpy.asarray(rng.normal(0, 0.2, x.shape).astype(np.float32))
  return jax.tree.map(draw, state.joined())


def loss_of(config):
  """A jitted function of the parts that loss_fn takes."""
  stage, rows = make_stage(config), np.random.default_rng(0)
  batch = {"image": rows.integers(0, 256, (8, 16, 16, 3), np.uint8)}
  if config.stage == "ar":
    draw = lambda high, *shape: rows.integers(0, high, (8, *shape)).astype(np.int32)
    batch = {"token_ids": draw(64, 8), "length": np.full(8, 8, np.int32), "label": draw(4)}
    batch |= {"text_ids": draw(200, 8), "text_lengths": np.full(8, 8, np.int32)}
  return jax.jit(lambda params: stage.loss_fn(params, batch, jax.random.key(0), jax.numpy.int32(0))[0])


def ar_config(**lora):
  text = dict(encoder="bytes", max_length=8, features=16, depth=2, head_dim=16)
  ar = dict(width=32, depth=3, head_dim=16, num_ids=64, num_tokens=8, condition="text")
  return config_of(stage="ar", ar=ar, text=text, lora=lora)


def test_a_run_with_lora(base, tmp_path):
  """Decoder by LoRA, encoder in full; what is written is the merged model."""
  params, path = base
  config = config_of(init_from=path, train=TRAIN, lora=dict(rank=2, parts=("decoder",)), optim=dict(ema_decay=0.0))
  train(config, tmp_path / "run")
  assert_trees_equal(read_checkpoint(tmp_path / "run", 4, "frozen"), {"decoder": params["decoder"]})
  average = read_checkpoint(tmp_path / "run", 4, "ema")
  assert set(average) == {"encoder", "lora"} and set(average["lora"]) == {"decoder"}
  assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(average["lora"]))
  merged = make_stage(config).merged({**average, "decoder": params["decoder"]})
  factors, kernel = (tree["decoder"]["transformer"]["last"]["mlp"]["out"] for tree in (average["lora"], params))
  expected = kernel["kernel"] + 16 / 2 * np.asarray(factors["lora_down"]) @ np.asarray(factors["lora_up"])
  np.testing.assert_allclose(merged["decoder"]["transformer"]["last"]["mlp"]["out"]["kernel"], expected, atol=1e-6)
  for source in (tmp_path / "run", tmp_path / "run" / "weights.safetensors"):
    assert_trees_equal(loading.load(source)[1], {name: merged[name] for name in ("encoder", "decoder")})
  assert loading.load(tmp_path / "run", param_dtype="bfloat16")[1]["decoder"]["mask_token"].dtype == "bfloat16"
  other = resumed(tmp_path / "run", config, tmp_path)
  for name in ("params", "ema", "opt_state"):
    assert_trees_equal(read_checkpoint(other, 4, name), read_checkpoint(tmp_path / "run", 4, name))


@pytest.mark.parametrize("make", [lambda **lora: config_of(decoder=dict(depth=3), lora=lora), ar_config])
def test_merged_and_unmerged_factors_are_the_same_model(make):
  config = make(rank=3, alpha=6.0)
  stage, loss, parts = make_stage(config), loss_of(make()), lora_state(make(rank=3, alpha=6.0))
  names = {"/".join(p[:-1]) for p in flatten_dict(parts["lora"]) if p[-1] == "lora_down"}
  kinds = {name.rpartition("attention/")[2].rpartition("mlp/")[2].rpartition("cross/")[2] for name in names}
  assert kinds == {"qkv", "out", "in", "gate"} | ({"q", "kv"} if config.stage == "ar" else set())
  merged, attached, plain = loss(stage.merged(parts)), loss(stage.attached(parts)), loss(stage.merged(zeroed(parts)))
  assert abs(merged - plain) > 1e-3  # the factors change the model
  np.testing.assert_allclose(merged, attached, rtol=2e-6)  # measured: 2e-7


def zeroed(parts):
  """The parts with new factors, which add nothing."""
  flat = flatten_dict(parts)
  return unflatten_dict({path: x * 0 if path[-1] == "lora_up" else x for path, x in flat.items()})


def test_new_factors_change_no_bit():
  config = config_of(lora=dict(rank=2))
  state = unbox(jax.jit(lambda key: init_state(make_stage(config), optax.sgd(0.1), key))(jax.random.key(0)))
  parts = zeroed(lora_state(config))
  assert all(not x.any() for path, x in flatten_dict(state.params).items() if path[-1] == "lora_up")
  assert all(x.any() for path, x in flatten_dict(state.params).items() if path[-1] == "lora_down")
  stage, loss = make_stage(config), loss_of(config_of())
  base = {name: tree for name, tree in parts.items() if name != "lora"}
  assert_trees_equal(stage.merged(parts), base)
  assert loss(stage.attached(parts)) == loss(base)


def test_lora_costs_little():
  full, lora = (config_of(fast=False, lora=dict(rank=rank)) for rank in (0, 2))
  state, part = state_of(lora), full.decoder
  assert set(state.params) == {"lora"}
  hidden = int(2 * int(4 * part.width) / 3)  # of the gated MLP
  # In and out of qkv, out, mlp/in, mlp/gate, mlp/out.
  sizes = [(32, 3 * 32), (32, 32), (32, hidden), (32, hidden), (hidden, 32)]
  assert bytes_of(state.params) == 2 * 4 * 2 * sum(a + b for a, b in sizes)  # float32, rank 2, encoder and decoder
  assert bytes_of(state.opt_state) - 2 * bytes_of(state.params) <= 64
  assert goodput.update_flops(lora) < 0.85 * goodput.update_flops(full)


def test_a_model_trained_by_lora_is_exported_as_an_official_one(tmp_path):
  config = latent_config(lora=dict(rank=2), train=dict(parts=("decoder",)))
  merged = make_stage(config).merged(lora_state(config))
  saving.save_official(tmp_path / "official", config, merged)
  assert_trees_equal(loading.load(tmp_path / "official", vae_norm_num_groups=4, image_size=16)[1], merged)


def test_an_official_folder_is_tuned_and_exported(tmp_path):
  vae = dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(32,), layers_per_block=1, norm_groups=32)
  released = config_of(vae=vae | dict(scaling_factor=0.25))
  params = make_params(make_stage(released))
  saving.save_official(tmp_path / "official", released, params)
  settings = dict(init_from=str(tmp_path / "official"), lora=dict(rank=2), vae=vae | dict(scaling_factor=0.0))
  train(tuned(**settings, train=TRAIN | dict(num_steps=1, parts=("decoder",))), tmp_path / "run")
  config, tuned_params = loading.load(tmp_path / "run")
  assert config.vae.scaling_factor == 0.25
  for part in ("vae", "encoder"):
    assert_trees_equal(tuned_params[part], params[part])
  saving.save_official(tmp_path / "exported", config, tuned_params)
  assert_trees_equal(loading.load(tmp_path / "exported", image_size=16)[1], tuned_params)


# Bad input.


def test_bad_lora():
  refuse = lambda words, **settings: fails(words, make_stage, config_of(**settings))
  decoder = dict(parts=("decoder",))
  refuse("lora.parts names the encoder, which train.parts freezes: add it to", train=decoder, lora=dict(
    rank=2, parts=("encoder",)
  ))  # fmt: skip
  refuse("lora.parts names the part 'vae': the parts trained here are encoder, decoder$", lora=dict(
    rank=2, parts=("vae",)
  ))  # fmt: skip
  refuse("lora.parts=.* has no effect with lora.rank=0", lora=decoder)
  vae = dict(kind="autoencoder_kl", block_out_channels=(8,), norm_groups=4, layers_per_block=1)
  refuse("lora.rank=2 is for stages 'tokenizer' and 'ar'", stage="vae", vae=vae, lora=dict(rank=2))
  refuse("lora.rank must be a whole number", lora=dict(rank=-1))


def test_bad_parts(base, tmp_path):
  config = tuned(train=dict(parts=("decodr",)))
  fails("train.parts names the part 'decodr': the parts trained here are encoder, decoder$", make_stage, config)
  fails("train.parts must be a tuple", make_stage, config_of(train=dict(parts=(3,))))
  fails("train.parts names the part 'encoder': .* are decoder$", make_stage, config_of(
    stage="distill", decoder=dict(interval=True), sampler=dict(guidance="none"), train=dict(parts=("encoder",))
  ))  # fmt: skip
  fails("the frozen encoder needs trained weights: give config.init_from", train, tuned(), tmp_path)


def test_rates_are_for_parts_that_the_run_trains():
  pattern, rates = "optim.rates.encoder=0.1 has no effect, as the encoder is not trained", dict(encoder=0.1)
  check = lambda config: optim.check(config, make_stage(config).trained_parts)
  fails(pattern, check, tuned(optim=dict(rates=rates)))
  student = dict(stage="distill", decoder=dict(interval=True), sampler=dict(num_steps=4, guidance="none"))
  fails(pattern, check, config_of(**student, optim=dict(rates=rates)))
  both = dict(parts=("encoder", "decoder"))
  for lora in (dict(), dict(rank=2)):  # rates apply to LoRA as well
    check(tuned(train=both, optim=dict(rates=rates), lora=lora))
