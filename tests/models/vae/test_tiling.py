"""Tiles: what they compute is what the whole picture gives, in less memory."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

import flextok_jax
from flextok_jax import config as common
from flextok_jax.inference.tokenizer import FlexTok, with_positions
from flextok_jax.models.vae import autoencoder, tiling
from flextok_jax.stages.vae import make_vae
from tests.support.random_tokenizer import random_model, with_fields

LEVEL = 2 / 255  # of 8-bit pixels, in [-1, 1]
SIZES = dict(latent_channels=4, block_out_channels=(8, 8, 16), layers_per_block=1, norm_groups=4)  # 4x down
TILE = 48  # pixels, of which 48 - 2 * 4 * 4 = 16 per decoded tile are not in the overlap


@pytest.fixture(scope="module")
def params():
  """Kernels of variance 1 / fan-in, norm scales about 1, biases about 0."""
  model = autoencoder.AutoencoderKL(**SIZES)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3))))["params"]
  rng = np.random.default_rng(0)

  def draw(path, x):
    deviation = np.prod(x.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.1
    return (rng.normal(size=x.shape) * deviation + (path[-1].key == "scale")).astype(np.float32)

  return {"vae": jax.tree_util.tree_map_with_path(draw, shapes)}


@functools.cache
def config(tile):
  return FrozenConfigDict(common.derive(stage="vae", image_size=32, vae=SIZES | {"tile": tile, "scaling_factor": 1.0}))


def pictures(batch, height, width):
  """Returns smooth colours, dark and without contrast on the right half, with a little noise."""
  rng = np.random.default_rng(0)
  rough = rng.uniform(-1, 1, (batch, 4, 5, 3)).astype(np.float32)
  images = np.array(jax.image.resize(rough, (batch, height, width, 3), "linear"))
  images[:, :, width // 2 :] = images[:, :, width // 2 :] * 0.2 - 0.7
  return np.clip(images + rng.normal(scale=0.05, size=images.shape), -1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def whole(params):
  """Returns images, their latents and what these decode to, without tiles."""
  model, images = FlexTok(params, config(0)), pictures(2, 100, 72)
  latents = model.encode_latents(images)
  return images, latents, np.asarray(model.decode_latents(latents))


def test_tiles_give_the_whole_picture(params, whole):
  images, latents, decoded = whole
  model = FlexTok(params, config(TILE))
  np.testing.assert_allclose(model.encode_latents(images), latents, atol=2e-3 * np.abs(latents).max())
  error = np.abs(model.decode_latents(latents) - decoded)
  assert error.max() < 0.5 * LEVEL
  # Steps between neighbours, across the borders of tiles as elsewhere.
  tiled = np.asarray(model.decode_latents(latents))
  for axis in (1, 2):
    assert np.abs(np.diff(tiled, axis=axis) - np.diff(decoded, axis=axis)).max() < 0.5 * LEVEL


def test_statistics_of_single_windows_would_not_do(params, whole, monkeypatch):
  """So the first test can fail: after one pass, where each window has its own statistics, seams are visible."""
  _, latents, decoded = whole
  monkeypatch.setattr(tiling, "TOLERANCE", np.inf)
  vae = make_vae(config(TILE)).bind({"params": params["vae"]})
  assert np.abs(tiling.decode(vae, latents, TILE) - decoded).max() > 10 * LEVEL


def test_a_picture_does_not_depend_on_the_others(params, whole):
  _, latents, _ = whole
  model = FlexTok(params, config(TILE))
  others = jnp.stack([latents[0], jnp.zeros_like(latents[1])])
  np.testing.assert_array_equal(model.decode_latents(others)[0], model.decode_latents(latents)[0])


def test_pictures_of_a_tile_are_not_divided(params):
  images = pictures(1, TILE, TILE - 4)
  whole, tiled = (FlexTok(params, config(tile)) for tile in (0, TILE))
  latents = whole.encode_latents(images)
  np.testing.assert_array_equal(tiled.encode_latents(images), latents)
  np.testing.assert_array_equal(tiled.decode_latents(latents), whole.decode_latents(latents))


def test_memory_is_that_of_a_tile(monkeypatch):
  """By XLA's own account: less than a third of that of the whole, 192 x 192 pixels with 64 channels at full size."""
  monkeypatch.setattr(autoencoder, "_MAX_QUERIES", 256)  # the square of this is small beside 192 x 192 x 64
  vae = autoencoder.AutoencoderKL(4, (64, 32, 16), layers_per_block=1, norm_groups=4)
  params = nn.unbox(jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3))))

  def temporary(function, x):
    compiled = jax.jit(lambda params, x: function(vae.bind(params), x)).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  images, latents = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 192, 192, 3), (1, 48, 48, 4)))
  encode, decode = (functools.partial(function, tile=TILE) for function in (tiling.encode, tiling.decode))
  assert temporary(encode, images) < temporary(lambda vae, x: vae.encode(x), images) / 3
  assert temporary(decode, latents) < temporary(lambda vae, x: vae.decode(x), latents) / 3


def test_attention_in_parts_is_attention(params, monkeypatch):
  module = autoencoder.SpatialAttention(4, jnp.float32)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 7, 16)), jnp.float32)
  variables = {"params": params["vae"]["decoder"]["mid"]["attention"]}
  whole = module.apply(variables, x)
  monkeypatch.setattr(autoencoder, "_MAX_QUERIES", 16)  # 5 parts of 7 queries
  np.testing.assert_allclose(module.apply(variables, x), whole, atol=1e-6)


@pytest.mark.parametrize("tile", [34, 32, 1002])
def test_a_tile_within_the_overlap_is_one_line(tile):
  with pytest.raises(ValueError, match=f"vae.tile={tile} must be 0, .* a multiple of 4 of at least 36") as error:
    make_vae(config(tile))
  assert "\n" not in str(error.value)


def test_a_tokenizer_decodes_in_tiles():
  model = with_positions(random_model(), "interpolate", ("decoder",))
  tiled = dataclasses.replace(model, config=with_fields(model, vae=dict(tile=36)))
  given = dict(key=jax.random.key(0), num_steps=1, guidance="none", size=(40, 64))
  ids = np.arange(6)[None]
  expected, found = model.detokenize(ids, **given), tiled.detokenize(ids, **given)
  np.testing.assert_allclose(found, expected, atol=0.5 * LEVEL)
  assert not np.array_equal(found, expected)  # computed in tiles


def test_size_that_does_not_divide_is_one_line(params):
  vae = make_vae(config(TILE)).bind({"params": params["vae"]})
  with pytest.raises(ValueError, match="image size 98x72 is not a multiple of 4"):
    tiling.encode(vae, jnp.zeros((1, 98, 72, 3)), TILE)


def test_load_takes_the_size_of_tiles(params, tmp_path, whole):
  FlexTok(params, config(0)).save_pretrained(tmp_path / "vae")
  model = flextok_jax.load(tmp_path / "vae", vae_tile=TILE)
  assert model.config.vae.tile == TILE
  with pytest.raises(ValueError, match="vae_tile=64 has no effect, as this model has no VAE"):
    flextok_jax.load("shapes", vae_tile=64)
  with pytest.raises(ValueError, match="vae_tile=-1 must be a whole number from 0"):
    flextok_jax.load("shapes", vae_tile=-1)
