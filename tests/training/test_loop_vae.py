"""Runs of stage "vae" with all losses: outputs, resuming, the scaling factor, LPIPS, optimisers, export."""

import json
import shutil
import types

from flax.core.meta import unbox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import flextok_jax
from flextok_jax import train
from flextok_jax.config import check
from flextok_jax.core import images as images_lib
from flextok_jax.data import pipeline
from flextok_jax.evals.from_config import make_measure
from flextok_jax.evals.metrics import image as metrics
from flextok_jax.models.perception import lpips
from flextok_jax.models.vae.autoencoder import sample_posterior
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.tools.benchmark import jobs as benchmark_jobs
from flextok_jax.training import checkpoint, inputs, loop, optim
from flextok_jax.training.state import init_state
from flextok_jax.weights import loading
from tests.support import lpips_reference
from tests.support.runs import checkpoint_steps, read_checkpoint, read_metrics, step_of_weights
from tests.support.vae_stage import KEY, START, assert_close, batch_of, config_of, params_of, plain_step

pytestmark = pytest.mark.usefixtures("shared_programs")

STEPS = 4


def config_of_run(**overrides):
  """Four steps with a checkpoint after two; the discriminator is active in the last two."""
  run = dict(
    num_steps=STEPS, log_every=1, checkpoint_every=2, eval_every=STEPS, keep_checkpoints=2, export_dtype="float32"
  )
  return config_of(
    **dict(
      image_size=16,
      vae=dict(latent_channels=16, scaling_factor=0.0),
      train=run,
      discriminator=dict(weight=0.5, start_step=2, channels=4, num_layers=1),
      optim=dict(warmup_steps=1),
      eval=dict(num_images=6, batch_size=4),
    )
    | overrides
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir, config = tmp_path_factory.mktemp("vae") / "run", config_of_run()
  train.train(config, str(workdir))
  return types.SimpleNamespace(workdir=workdir, config=config, weights=workdir / "weights.safetensors")


def eval_images(config):
  size = dict(image_size=config.image_size, num_images=config.eval.num_images)
  return pipeline.eval_set(inputs.image_data(config), "synthetic", **size)["image"]


def test_a_run_trains_both_networks_and_exports_the_autoencoder(run):
  lines, evals = read_metrics(run.workdir)
  assert [x["step"] for x in lines] == [1, 2, 3, 4]
  for line in lines:
    assert ("loss_discriminator" in line) == (line["step"] > 2) and line["kl"] > 0
  before, after = (read_checkpoint(run.workdir, step, "params")["discriminator"] for step in (2, 4))
  assert not np.array_equal(before["conv_0"]["kernel"], after["conv_0"]["kernel"])
  average = read_checkpoint(run.workdir, 4, "ema")
  assert set(average) == {"vae", "discriminator"}
  assert {name.split("/")[0] for name in load_file(run.weights)} == {"vae"}
  for source in (run.workdir, run.weights):
    _, params = loading.load(str(source))
    jax.tree.map(np.testing.assert_array_equal, params, {"vae": average["vae"]})
  model, images = flextok_jax.load(run.weights), eval_images(run.config)
  restored = np.clip(model.decode_latents(model.encode_latents(images)), -1, 1)
  psnr = metrics.psnr(images / np.float32(255), images_lib.round_to_8bit(restored)).mean()
  np.testing.assert_allclose(evals[-1]["eval/synthetic/psnr_vae"], psnr, rtol=1e-5)


def test_a_killed_run_resumes_to_the_same_result(run, tmp_path, caplog):
  """As if killed after its first checkpoint, before the discriminator starts; its update is the same program."""
  again = tmp_path / "again"
  shutil.copytree(run.workdir, again)
  shutil.rmtree(again / "checkpoints" / "4")
  (again / "weights.safetensors").unlink()
  with jax.log_compiles():
    train.train(run.config, str(again))
  assert "Compiling jit(reconstruct)" in caplog.text and "Compiling jit(update)" not in caplog.text
  assert checkpoint_steps(again) == [2, 4] and step_of_weights(again) == "4"
  for name in ("params", "ema", "opt_state"):
    jax.tree.map(np.testing.assert_array_equal, *(read_checkpoint(x, 4, name) for x in (run.workdir, again)))
  assert run.weights.read_bytes() == (again / "weights.safetensors").read_bytes()


# The scaling factor.


def test_scaling_factor_gives_latents_unit_deviation(run, tmp_path, caplog):
  config, params = loading.load(str(run.weights))
  images = eval_images(config)
  vae = make_stage(config).vae

  @jax.jit
  def draw(vae_params, images):
    mean, logvar = vae.apply({"params": vae_params}, images / np.float32(127.5) - 1, method="encode")
    return jax.vmap(lambda key: sample_posterior(mean, logvar, key))(jax.random.split(KEY, 50))

  draws = draw(params["vae"], images)
  np.testing.assert_allclose(config.vae.scaling_factor * np.std(draws), 1, rtol=5e-3)
  # Each checkpoint has its own factor.
  half = tmp_path / "half"
  shutil.copytree(run.workdir, half)
  shutil.rmtree(half / "checkpoints" / "4")
  early, weights = loading.load(str(half))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  evaluator = types.SimpleNamespace(images={"a": images[:1], "b": images[1:]})
  measure = make_measure(run.config, make_stage(run.config), mesh, evaluator)
  np.testing.assert_allclose(early.vae.scaling_factor, measure(weights)["vae.scaling_factor"], rtol=1e-5)
  assert early.vae.scaling_factor != config.vae.scaling_factor
  for source, expected in ((run.workdir, config), (run.weights, config), (half, early)):
    assert loading.load_config(source).vae.scaling_factor == expected.vae.scaling_factor
  assert loading.load_config(run.workdir) == loading.load(run.workdir)[0]
  assert not caplog.records  # orbax would warn of items that are not read


def test_an_explicit_scaling_factor_is_kept(run):
  config = config_of_run(vae=dict(scaling_factor=0.3))
  assert make_measure(config, None, None, None)({}) == {}


def test_a_tokenizer_uses_the_factor_of_its_vae(run, tmp_path):
  config = config_of_run(stage="tokenizer", init_from=str(run.weights))
  workdir, factor = tmp_path / "tokenizer", loading.load_config(run.weights).vae.scaling_factor
  found = inputs.with_weights(config, str(workdir))
  assert found.vae.scaling_factor == factor > 0
  assert make_stage(found).model.scaling_factor == factor
  workdir.mkdir()
  checkpoint.claim_workdir(str(workdir), found)
  config.init_from = ""  # a resumed run already has it
  assert inputs.with_weights(config, str(workdir)).vae.scaling_factor == factor
  with pytest.raises(ValueError, match="vae.scaling_factor=0 takes the factor of the weights to start from: set init"):
    train.train(config, str(tmp_path / "other"))
  bare = loading.load(str(run.weights))
  unknown = bare[0].copy_and_resolve_references().unlock()
  unknown.vae.scaling_factor = 0.0
  flextok_jax.weights.saving.save_weights(tmp_path / "bare.safetensors", unknown, bare[1])
  config.init_from = str(tmp_path / "bare.safetensors")
  with pytest.raises(ValueError, match="bare.safetensors has no scaling factor of its latents: set vae.scaling_factor"):
    train.train(config, str(tmp_path / "other"))


# LPIPS.


@pytest.fixture
def networks(tmp_path, monkeypatch):
  """A folder with random weights of LPIPS on a two-layer VGG; full size: tests/models/perception/test_lpips.py."""
  monkeypatch.setitem(lpips.NETS, "vgg", ((0, ((0, 64, 3, 1, 1),)), (2, ((5, 8, 3, 1, 1),))))
  folder = tmp_path / "networks"
  folder.mkdir()
  backbone, heads = lpips_reference.weights("vgg")
  save_file(backbone, folder / "lpips_vgg.safetensors")
  save_file(heads, folder / "lpips_vgg_heads.safetensors")
  return folder


def lpips_config(folder, **overrides):
  loss = dict(l1_weight=1.0, l2_weight=0.3, kl_weight=1e-3, lpips_weight=0.7, lpips=str(folder))
  return config_of_run(vae_loss=loss, **overrides)


def test_perceptual_loss_is_lpips_and_contributes_gradients(networks):
  config = lpips_config(networks, discriminator=dict(start_step=START))
  stage = make_stage(config)
  params = {**params_of(stage), **inputs.read_networks(stage.pretrained_networks, config.vae_loss.lpips)}
  batch = batch_of(size=16)
  (loss, told), grads = jax.jit(jax.value_and_grad(stage.loss_fn, has_aux=True))(params, batch, KEY, START)
  expected, plain, weight = jax.jit(lambda *args: plain_step(stage, *args))(params, batch, KEY)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(told["adaptive_weight"][0], weight, rtol=1e-4)
  assert not any(np.any(g) for g in jax.tree.leaves(grads.pop("lpips")))
  assert_close(grads, plain, rtol=1e-4)
  images = batch["image"] / np.float32(127.5) - 1

  @jax.jit
  def distances(params, images):
    mean, logvar = stage.vae.apply({"params": params["vae"]}, images, method="encode")
    recon = stage.vae.apply({"params": params["vae"]}, sample_posterior(mean, logvar, KEY), method="decode")
    return lpips.LPIPS("vgg").apply({"params": params["lpips"]}, (recon + 1) / 2, (images + 1) / 2)

  np.testing.assert_allclose(told["lpips"][0], distances(params, images).sum(), rtol=1e-4)


def test_lpips_weights_are_not_exported_with_the_autoencoder(networks, tmp_path):
  alone = dict(vae=dict(scaling_factor=0.5), discriminator=dict(weight=0.0))
  config = lpips_config(networks, train=dict(num_steps=1, checkpoint_every=1), **alone)
  loop.train(config, str(tmp_path / "run"))
  frozen = read_checkpoint(tmp_path / "run", 1, "frozen")
  jax.tree.map(
    np.testing.assert_array_equal,
    frozen,
    inputs.read_networks(make_stage(config).pretrained_networks, config.vae_loss.lpips),
  )
  assert set(loading.load(str(tmp_path / "run"))[1]) == {"vae"}
  assert read_metrics(tmp_path / "run")[0][0]["lpips"] > 0


def test_missing_lpips_weights_are_a_one_line_error(networks, tmp_path):
  read_networks = lambda config: inputs.read_networks(make_stage(config).pretrained_networks, config.vae_loss.lpips)
  with pytest.raises(ValueError, match=r"vae_loss.lpips='' must be a folder with lpips_vgg, .*vgg16-397923af"):
    train.train(lpips_config(""), str(tmp_path / "run"))
  with pytest.raises(ValueError, match="must be a folder with lpips_vgg, .*: put there the state_dict of"):
    read_networks(lpips_config(tmp_path))
  save_file({"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}, tmp_path / "lpips_vgg.safetensors")
  with pytest.raises(ValueError, match="lpips_vgg.safetensors lacks the tensor"):
    read_networks(lpips_config(tmp_path))
  assert read_networks(config_of()) == {}


def test_benchmark_includes_all_parts(networks):
  config = lpips_config(networks)
  args, made = benchmark_jobs.TokenizerBenchmark(config, ("fast",), 2, False).prepare("train", None)
  state, _ = jax.eval_shape(made[benchmark_jobs.ONLY][0], *args)
  assert set(state.params) == {"vae", "discriminator"} and set(state.frozen) == {"lpips"}


# Optimisers.


def test_discriminator_has_its_own_optimiser():
  """Each side has its own norm for clipping, its own Adam and its own learning rate."""
  own = dict(learning_rate=0.02, clip_norm=2.0, b1=0.5, b2=0.9)
  settings = config_of(
    optim=dict(learning_rate=0.1, warmup_steps=0, clip_norm=0.5, weight_decay=0.0, b1=0.0, discriminator=own)
  ).optim
  optimizer = optim.make_optimizer(settings, 100)
  params = {"vae": {"kernel": jnp.zeros(4)}, "discriminator": {"kernel": jnp.zeros(4)}}
  grads = {"vae": {"kernel": jnp.full(4, 30.0)}, "discriminator": {"kernel": jnp.full(4, 7.0)}}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for _ in range(3):
    updates, state = update(grads, state, params)
  np.testing.assert_allclose(updates["vae"]["kernel"], np.full(4, -0.1), rtol=2e-2)  # from the cosine schedule
  np.testing.assert_allclose(updates["discriminator"]["kernel"], np.full(4, -0.02), rtol=2e-2)
  mu = {
    name: next(s.mu for s in jax.tree.leaves(inner, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    for name, inner in state.inner_states.items()
  }
  np.testing.assert_allclose(optax.tree.norm(mu["rest"]), 0.5, rtol=1e-5)
  np.testing.assert_allclose(optax.tree.norm(mu["discriminator"]), 2.0 * (1 - 0.5**3), rtol=1e-5)


def test_without_a_discriminator_there_is_one_plain_optimiser():
  """Older checkpoints can therefore be resumed: only clipping and AdamW, without a wrapper."""
  config = config_of(weight=0.0)
  state = unbox(
    jax.eval_shape(lambda key: init_state(make_stage(config), optim.make_optimizer(config.optim, 9), key), KEY)
  )
  plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 1e-3, mask=optim.decay_mask))
  assert jax.tree.structure(state.opt_state) == jax.tree.structure(jax.eval_shape(plain.init, state.params))


@pytest.mark.parametrize(
  "overrides, words",
  [
    (dict(name="muon"), "optim.name='muon' is for transformers and stage 'vae' has no transformer blocks: use 'adamw'"),
    (dict(discriminator=dict(b1=1.0)), r"optim.discriminator.b1 must be a finite number in \[0, 1\), got 1.0"),
    (
      dict(discriminator=dict(learning_rate=0.0)),
      "optim.discriminator.learning_rate must be a finite number above 0, got 0",
    ),
    (dict(discriminator=dict(clip_norm=-1.0)), "optim.discriminator.clip_norm must be a finite number above 0, got -1"),
  ],
)
def test_invalid_optimiser_settings(overrides, words):
  config = config_of(optim=overrides)
  with pytest.raises(ValueError, match=words):
    check(config)
    optim.check(config, ())


def test_weight_decay_of_an_encoder_that_stays_is_refused():
  config = config_of(vae_loss=dict(train_encoder=False), optim=dict(weight_decay=0.1))
  with pytest.raises(ValueError, match="optim.weight_decay=0.1 would shrink the encoder.*use 0"):
    optim.check(config, ())


# Export.


def test_trained_vae_is_exported_with_its_measured_factor(run, tmp_path):
  model = flextok_jax.load(run.workdir)
  model.to_official(tmp_path / "vae")
  written = json.loads((tmp_path / "vae" / "config.json").read_text())
  assert written["scaling_factor"] == loading.load_config(run.weights).vae.scaling_factor
  assert written["latent_channels"] == 16
  again, images = flextok_jax.load(tmp_path / "vae", image_size=16), eval_images(run.config)
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  np.testing.assert_allclose(again.encode_latents(images), model.encode_latents(images), atol=1e-5)


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_diffusers_computes_the_same_from_an_export(channels, tmp_path):
  diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
  import torch

  config = config_of(vae=dict(latent_channels=channels, block_out_channels=(8, 16), scaling_factor=0.7))
  stage = make_stage(config)
  params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(KEY, x.shape), {"vae": params_of(stage)["vae"]})
  saved = tmp_path / "ours.safetensors"
  flextok_jax.weights.saving.save_weights(saved, config, nn.unbox(params))
  model = flextok_jax.load(saved)
  model.to_official(tmp_path / "vae")
  theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
  assert theirs.config.scaling_factor == 0.7
  images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
  with torch.no_grad():
    mean = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist.mode()
    decoded = theirs.decode(mean).sample.permute(0, 2, 3, 1).numpy()
  latents = model.encode_latents(images)
  np.testing.assert_allclose(latents, 0.7 * mean.permute(0, 2, 3, 1).numpy(), atol=1e-4)
  np.testing.assert_allclose(model.decode_latents(latents), decoded, atol=1e-4)
