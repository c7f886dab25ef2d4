"""The autoencoder: shapes, errors, numerics of its parts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax import config as common
from flextok_jax.models.vae import autoencoder as vae
from flextok_jax.stages import make_stage
from flextok_jax.stages.vae import make_vae

CHANNELS = (8, 8, 16)


def build(latent_channels=4, dtype=jnp.float32):
  """Returns a tiny model, 4x down."""
  return vae.AutoencoderKL(latent_channels, CHANNELS, layers_per_block=1, norm_groups=4, dtype=dtype)


@pytest.fixture(scope="module")
def params():
  """Kernels of variance 1 / fan-in, norm scales about 1, biases about 0."""
  shapes = nn.unbox(jax.eval_shape(build().init, jax.random.key(0), jnp.zeros((1, 4, 4, 3))))
  rng = np.random.default_rng(0)

  def draw(path, x):
    deviation = np.prod(x.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.1
    return (rng.normal(size=x.shape) * deviation + (path[-1].key == "scale")).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def compiled(method="__call__", dtype=jnp.float32):
  return jax.jit(functools.partial(build(dtype=dtype).apply, method=method))


def random_images(*shape):
  return np.random.default_rng(0).uniform(-1, 1, (*shape, 3)).astype(np.float32)


@pytest.mark.parametrize("latent_channels", [4, 8, 16])
def test_shapes_of_images_that_are_not_square(latent_channels):
  model = build(latent_channels)
  images = jax.ShapeDtypeStruct((2, 12, 20, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)
  mean, logvar = jax.eval_shape(functools.partial(model.apply, method="encode"), params, images)
  assert model.downscale == 4 and mean.shape == logvar.shape == (2, 3, 5, latent_channels)
  assert jax.eval_shape(functools.partial(model.apply, method="decode"), params, mean).shape == images.shape


def test_released_size():
  """The SDXL-like network of the released tokenizers: 8x down, 83.8M parameters."""
  model = vae.AutoencoderKL(16, (128, 256, 512, 512))
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  assert model.downscale == 8
  assert sum(x.size for x in jax.tree.leaves(params)) == 83_821_011


def test_axes_are_named_at_every_parameter():
  model = vae.AutoencoderKL(4, CHANNELS, norm_groups=4)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
  boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert boxes and all(isinstance(x, nn.LogicallyPartitioned) and len(x.names) == x.value.ndim for x in boxes)


@pytest.mark.parametrize("size", [(10, 12), (12, 10), (3, 3)])
def test_size_that_does_not_divide_is_one_line(params, size):
  with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} is not a multiple of 4") as error:
    build().apply(params, jnp.zeros((1, *size, 3)), method="encode")
  assert "\n" not in str(error.value)


def test_a_sample_does_not_see_the_others(params):
  images = random_images(3, 8, 12)
  other = images.copy()
  other[[0, 2]] = 0
  np.testing.assert_array_equal(compiled()(params, images)[1], compiled()(params, other)[1])


def test_kl_is_the_closed_form_and_zero_for_the_prior():
  rng = np.random.default_rng(0)
  mean, logvar = rng.normal(size=(2, 3, 2, 4, 5))
  # sum over the latent of log(1 / std) + (var + mean^2) / 2 - 1 / 2
  std = np.exp(logvar / 2)
  expected = (-np.log(std) + (std**2 + mean**2) / 2 - 0.5).sum((1, 2, 3))
  np.testing.assert_allclose(vae.kl_divergence(mean, logvar), expected, rtol=1e-5)
  np.testing.assert_array_equal(vae.kl_divergence(jnp.zeros((2, 3, 3, 4)), jnp.zeros((2, 3, 3, 4))), np.zeros(2))


def test_posterior_sample_has_its_mean_and_deviation():
  shape = (1, 64, 64, 4)
  x = vae.sample_posterior(jnp.full(shape, 2.0), jnp.full(shape, np.log(0.25)), jax.random.key(0))
  assert abs(x.mean() - 2.0) < 0.02 and abs(x.std() - 0.5) < 0.02  # 16,384 draws: standard errors 0.004 and 0.003
  other = vae.sample_posterior(jnp.full(shape, 2.0), jnp.full(shape, np.log(0.25)), jax.random.key(1))
  assert not np.allclose(x, other)


def test_logvar_is_clipped(params):
  bias = jnp.asarray([0.0] * 4 + [-100.0, 100.0, -100.0, 100.0])
  params = {"params": {**params["params"], "quant_conv": {**params["params"]["quant_conv"], "bias": bias}}}
  _, logvar = compiled("encode")(params, random_images(1, 8, 8))
  assert logvar.min() == -30 and logvar.max() == 20


def test_group_norm_computes_in_float32_under_bfloat16():
  """A spread of 1/8 on a mean of 64: in bfloat16 (steps of 1/2 at 64) the deviations would vanish."""
  x = 64 + np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32) / 8
  norm = vae.group_norm(4, "norm").clone(name=None)
  params = nn.unbox(norm.init(jax.random.key(0), x))
  groups = x.astype(np.float64).reshape(64, 4, 2)
  expected = (groups - groups.mean((0, 2), keepdims=True)[0]) / groups.std((0, 2), keepdims=True)[0]
  out = norm.apply(params, x)
  np.testing.assert_allclose(out, expected.reshape(x.shape), atol=1e-3)
  coarse = norm.apply(params, x.astype(jnp.bfloat16))
  assert out.dtype == coarse.dtype == jnp.float32
  np.testing.assert_allclose(coarse, norm.apply(params, x.astype(jnp.bfloat16).astype(jnp.float32)), atol=1e-6)


def test_bfloat16_compute_keeps_float32_outputs(params):
  images = random_images(3, 8, 12)
  out, exact = compiled(dtype=jnp.bfloat16)(params, images), compiled()(params, images)
  assert out.dtype == jnp.float32
  assert 0 < np.abs(out - exact).max() < 0.05 * np.abs(exact).max()  # some ten layers, each within 2^-9


def test_computes_in_the_type_of_its_section():
  config = common.derive(vae=dict(block_out_channels=CHANNELS, norm_groups=4))
  assert make_vae(config).dtype == jnp.float32 and config.dtype == "bfloat16"
  config.vae.dtype = "bfloat16"
  assert make_vae(config).dtype == jnp.bfloat16


def test_training_in_bfloat16_has_float32_losses(params):
  config = common.derive(
    stage="vae",
    image_size=8,
    vae=dict(latent_channels=4, block_out_channels=CHANNELS, layers_per_block=1, norm_groups=4, dtype="bfloat16"),
  )
  loss, metrics = jax.eval_shape(
    make_stage(config).loss_fn, {"vae": params["params"]}, {"image": random_images(2, 8, 8)}, jax.random.key(0), 0
  )
  assert {x.dtype for x in jax.tree.leaves((loss, metrics))} == {jnp.dtype("float32")}


def test_reconstruction_is_differentiable_in_every_parameter(params):
  images = random_images(2, 8, 8)

  def loss(params):
    mean, logvar = compiled("encode")(params, images)
    latents = vae.sample_posterior(mean, logvar, jax.random.key(2))
    error = compiled("decode")(params, latents) - images
    return jnp.abs(error).mean() + 1e-2 * vae.kl_divergence(mean, logvar).mean()

  grads = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
  assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for _, g in grads)
  # A key bias shifts all logits of a query equally, so the softmax and the loss do not depend on it.
  dead = [jax.tree_util.keystr(path) for path, g in grads if np.abs(g).max() < 1e-9]
  assert all("['to_k']['bias']" in path for path in dead), dead
