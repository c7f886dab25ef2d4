"""The losses of stage "vae" against separate backward passes, the reach of their gradients, and the discriminator."""

import functools

from flax.core.meta import unbox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flextok_jax.models.vae.autoencoder import sample_posterior
from flextok_jax.models.vae.discriminator import PatchDiscriminator, patches_of
from flextok_jax.ops import adversarial
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import metrics as metrics_lib
from flextok_jax.training import optim
from flextok_jax.training.state import TrainState, init_state, make_update
from tests.support.vae_stage import KEY, START, assert_close, batch_of, config_of, params_of, plain_step


@functools.cache
def compiled(**overrides):
  """(stage, its parameters, jitted (params, batch, key, step) -> ((loss, metrics), gradients))."""
  stage = make_stage(config_of(**overrides))
  step = jax.jit(jax.value_and_grad(stage.loss_fn, has_aux=True))
  return stage, params_of(stage), lambda *args: jax.device_get(step(*args))


def test_one_gradient_equals_separate_backward_passes():
  stage, params, step = compiled()
  (loss, metrics), grads = step(params, batch_of(), KEY, START)
  expected, plain, weight = jax.jit(functools.partial(plain_step, stage))(params, batch_of(), KEY)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics["adaptive_weight"][0], weight, rtol=1e-5)
  assert 0 < weight < 1e3 and np.abs(plain["discriminator"]["conv_0"]["kernel"]).max() > 1e-3
  assert_close(grads, plain)


def test_metrics_are_the_parts_of_the_loss():
  stage, params, step = compiled()
  (loss, metrics), _ = step(params, batch_of(), KEY, START)
  m = {name: total / count for name, (total, count) in metrics.items()}
  assert set(m) == {
    "loss",
    "l1",
    "l2",
    "detail",
    "kl",
    "loss_generator",
    "loss_discriminator",
    "logits_real",
    "logits_fake",
    "adaptive_weight",
    "latent_mean",
    "latent_std",
    "posterior_std",
  }
  assert {x.dtype for x in jax.tree.leaves((loss, metrics))} == {jnp.dtype("float32")}
  np.testing.assert_allclose(m["loss"], loss, rtol=1e-6)
  w = stage.loss_weights
  apart = w.l1_weight * m["l1"] + w.l2_weight * m["l2"] + w.detail_weight * m["detail"] + w.kl_weight * m["kl"]
  apart += m["adaptive_weight"] * m["loss_generator"] + m["loss_discriminator"]
  np.testing.assert_allclose(loss, apart, rtol=1e-5)
  np.testing.assert_allclose(m["loss_generator"], -m["logits_fake"], rtol=1e-6)

  @jax.jit
  def of_latents(params, images):
    mean, logvar = stage.vae.apply({"params": params["vae"]}, images, method="encode")
    latents = sample_posterior(mean, logvar, KEY)
    return [latents.mean(), latents.std(), jnp.exp(logvar / 2).mean()]

  np.testing.assert_allclose(
    [m["latent_mean"], m["latent_std"], m["posterior_std"]],
    of_latents(params, batch_of()["image"] / np.float32(127.5) - 1),
    rtol=1e-4,
    atol=1e-6,
  )


def test_the_two_sides_do_not_depend_on_each_others_loss():
  """The gradient of the discriminator does not depend on the weight, nor that of the VAE on the hinge loss."""
  _, params, step = compiled()
  _, _, other = compiled(weight=7.0)
  one, two = (f(params, batch_of(), KEY, START)[1] for f in (step, other))
  jax.tree.map(np.testing.assert_array_equal, one["discriminator"], two["discriminator"])
  assert np.abs(one["vae"]["decoder"]["conv_in"]["kernel"] - two["vae"]["decoder"]["conv_in"]["kernel"]).max() > 1e-4
  # An offset of all logits changes only the hinge loss: the loss of the generator is linear in the logits.
  last = params["discriminator"]["conv_2"]
  moved = {**params, "discriminator": {**params["discriminator"], "conv_2": {**last, "bias": last["bias"] + 0.7}}}
  (loss, _), three = step(moved, batch_of(), KEY, START)
  assert abs(loss - step(params, batch_of(), KEY, START)[0][0]) > 1e-2
  assert_close(three["vae"], one["vae"], rtol=1e-6)


def test_an_encoder_that_is_not_trained_stays_and_the_decoder_learns_as_before():
  config = config_of(vae_loss=dict(train_encoder=False), optim=dict(weight_decay=0.0))
  _, params, step = compiled()
  (loss, _), grads = jax.jit(jax.value_and_grad(make_stage(config).loss_fn, has_aux=True))(
    params, batch_of(), KEY, START
  )
  (expected, _), plain = step(params, batch_of(), KEY, START)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert_close(grads["vae"]["decoder"], plain["vae"]["decoder"], rtol=1e-6)
  encoder = {name: tree for name, tree in grads["vae"].items() if name in ("encoder", "quant_conv")}
  assert encoder and not any(np.any(x) for x in jax.tree.leaves(encoder))
  _, _, state = run_on(config, sharding.make_mesh(devices=jax.devices()[:1]), steps=3)
  for name in encoder:
    jax.tree.map(np.testing.assert_array_equal, state.params["vae"][name], params["vae"][name])
  assert np.any(state.params["vae"]["decoder"]["conv_in"]["kernel"] != params["vae"]["decoder"]["conv_in"]["kernel"])


def test_before_its_start_the_discriminator_does_not_change_the_loss():
  _, params, step = compiled()
  _, _, without = compiled(weight=0.0)
  (loss, metrics), grads = step(params, batch_of(), KEY, START - 1)
  (expected, other), plain = without({"vae": params["vae"]}, batch_of(), KEY, START)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert_close(grads["vae"], plain["vae"], rtol=1e-6)
  assert not any(np.any(g) for g in jax.tree.leaves(grads["discriminator"]))
  assert set(metrics) > set(other) and all(metrics[name][1] == 0 for name in set(metrics) - set(other))  # no sample


def test_adaptive_weight_by_hand():
  weight = lambda a, b: float(adversarial.adaptive_weight(jnp.asarray(a), jnp.asarray(b)))
  np.testing.assert_allclose(weight([[3.0], [4.0]], [[0.0], [0.5]]), 5 / 0.5001, rtol=1e-6)
  assert weight([0.0], [1.0]) == 0 and weight([2.0], [0.0]) == 1e4  # 2e4, bounded


def test_hinge_by_hand():
  real, fake = jnp.array([[2.0, 0.5], [1.0, -1.0]]), jnp.array([[-3.0, -1.0], [0.0, 2.0]])
  # 1 - real: 0, 0.5, 0, 2; 1 + fake: 0, 0, 1, 3.
  assert adversarial.discriminator_loss(real, fake) == (2.5 / 4 + 4 / 4) / 2
  assert adversarial.generator_loss(fake) == 0.5


# The discriminator.


def numpy_discriminator(params, images, num_layers):
  """NLayerDiscriminator in float64, by its definition."""

  def convolve(x, layer, stride):
    kernel = np.asarray(layer["kernel"], np.float64)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (4, 4), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel) + np.asarray(layer.get("bias", 0.0), np.float64)

  leaky = lambda x: np.where(x > 0, x, 0.2 * x)
  x = leaky(convolve(images.astype(np.float64), params["conv_0"], 2))
  for i in range(1, num_layers + 1):
    x = convolve(x, params[f"conv_{i}"], 2 if i < num_layers else 1)
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    x = leaky(x * np.asarray(params[f"norm_{i}"]["scale"]) + np.asarray(params[f"norm_{i}"]["bias"]))
  return convolve(x, params[f"conv_{num_layers + 1}"], 1)[..., 0]


@pytest.mark.parametrize("num_layers, size", [(2, (17, 14)), (3, (26, 40)), (1, (7, 6))])
def test_discriminator_equals_the_published_one(num_layers, size):
  model = PatchDiscriminator(4, num_layers)
  images = np.random.default_rng(0).uniform(-1, 1, (3, *size, 3)).astype(np.float32)
  shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]
  rng = np.random.default_rng(1)
  draw = lambda path, x: rng.normal(path[-1].key == "scale", 0.1, x.shape).astype(np.float32)
  params = jax.tree.map_with_path(draw, shapes)
  assert all(
    ("bias" in params[name]) == (name in ("conv_0", f"conv_{num_layers + 1}"))
    for name in params
    if name.startswith("conv")
  )
  logits = jax.jit(model.apply)({"params": params}, images)
  assert logits.shape == (3, *(patches_of(side, num_layers) for side in size))
  np.testing.assert_allclose(logits, numpy_discriminator(params, images, num_layers), atol=1e-4)


def test_discriminator_of_the_published_size():
  """2.77M parameters, 30x30 logits of 256 px, kernels of deviation 0.02."""
  model = PatchDiscriminator()
  image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  params = unbox(jax.eval_shape(model.init, jax.random.key(0), image))
  assert sum(x.size for x in jax.tree.leaves(params)) == 2_765_633
  assert jax.eval_shape(model.apply, params, image).shape == (1, 30, 30)
  drawn = unbox(jax.jit(PatchDiscriminator(64, 1).init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))["params"]
  np.testing.assert_allclose(np.std(drawn["conv_1"]["kernel"]), 0.02, rtol=0.02)
  np.testing.assert_allclose(np.std(drawn["norm_1"]["scale"] - 1), 0.02, rtol=0.3)


# Parts of a batch, devices, types.


def run_on(config, mesh, steps=5):
  """Losses by step, metrics of the last step, and the last state."""
  stage, optimizer = make_stage(config), optim.make_optimizer(config.optim, 20)
  boxed = jax.eval_shape(functools.partial(init_state, stage, optimizer), KEY)
  shardings, params = sharding.tree_shardings(boxed, mesh), compiled()[1]
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), unbox(boxed)).replace(params=params, ema=params)
  state = jax.device_put(state, shardings)
  update = jax.jit(
    make_update(stage, optimizer, accumulate_steps=config.optim.accumulate_steps, decay=0.9),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  batch = {**batch_of(8), "unreadable": np.zeros(8, np.int32)}
  losses = []
  for rows in sharding.device_batches(iter([batch] * steps), sharding.batch_sharding(mesh)):
    state, metrics = update(state, rows, KEY)
    losses.append(metrics_lib.compute(metrics)["loss"])
  return losses, metrics_lib.compute(metrics), state


def test_eight_devices_compute_the_same_as_one(monkeypatch):
  """Losses across the start of the discriminator; its statistics are those of the whole batch."""
  monkeypatch.setattr(sharding, "SMALL", 256)
  config = config_of(optim=dict(warmup_steps=2))
  expected, metrics, _ = run_on(config, sharding.make_mesh(devices=jax.devices()[:1]))
  losses, others, state = run_on(config, sharding.make_mesh(2, 4, 1))
  np.testing.assert_allclose(losses, expected, rtol=1e-4)
  assert set(others) == set(metrics) and "logits_real" in metrics
  for name in ("loss_discriminator", "logits_real", "logits_fake", "adaptive_weight", "l1"):
    np.testing.assert_allclose(others[name], metrics[name], rtol=2e-3, err_msg=name)
  assert len(state.params["discriminator"]["conv_1"]["kernel"].sharding.device_set) == 8


def test_accumulated_gradients_are_the_mean_over_the_parts():
  """Each part has its own adaptive weight and its own statistics, as each batch has."""
  stage, params, step = compiled()
  batch, at = batch_of(8), np.int32(START)
  state = TrainState(at, params, {}, params, optax.sgd(1.0).init(params))
  update = jax.jit(make_update(stage, optax.sgd(1.0), accumulate_steps=2, decay=0.9))
  after, metrics = update(state, {**batch, "unreadable": np.zeros(8, np.int32)}, KEY)
  key = jax.random.fold_in(KEY, START)
  parts = [step(params, {"image": batch["image"][i::2]}, jax.random.fold_in(key, i), START)[1] for i in range(2)]
  moved = jax.tree.map(lambda a, b: a - b, params, jax.device_get(after.params))
  assert_close(moved, jax.tree.map(lambda a, b: (a + b) / 2, *parts), rtol=1e-3)  # differences of rounded weights
  assert metrics["adaptive_weight"].count == 2


def test_bfloat16_has_nearly_the_same_gradient():
  stage, params, step = compiled()
  half = make_stage(config_of(vae=dict(dtype="bfloat16")))
  assert half.discriminator.dtype == jnp.bfloat16
  (loss, metrics), grads = jax.jit(jax.value_and_grad(half.loss_fn, has_aux=True))(params, batch_of(), KEY, START)
  (expected, others), exact = step(params, batch_of(), KEY, START)
  assert {x.dtype for x in jax.tree.leaves((loss, metrics, grads))} == {jnp.dtype("float32")}
  np.testing.assert_allclose(loss, expected, rtol=0.02)
  np.testing.assert_allclose(metrics["adaptive_weight"][0], others["adaptive_weight"][0], rtol=0.1)
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  for part in ("vae", "discriminator"):
    a, b = flat(grads[part]), flat(exact[part])
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.97, part


# Settings.


@pytest.mark.parametrize(
  "overrides, words",
  [
    (dict(weight=-0.5), "discriminator.weight must be a finite number of at least 0, got -0.5"),
    (dict(start_step=-1), "discriminator.start_step must be a whole number from 0 .*, got -1"),
    (dict(channels=0), "discriminator.channels must be a whole number from 1 .*, got 0"),
    (dict(num_layers=2), "discriminator.num_layers=2 leaves no patch of images of 8 px: they need 12 px"),
  ],
)
def test_invalid_settings_are_one_line_errors(overrides, words):
  config = config_of()
  config.discriminator.update(overrides)
  with pytest.raises(ValueError, match=words):
    make_stage(config)
