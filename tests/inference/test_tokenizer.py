"""The public interface: against golden numbers, against numpy, accepted and rejected arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file
import skimage.data

import flextok_jax
from flextok_jax.core import errors
from flextok_jax.inference import generator as generation
from flextok_jax.inference import programs
from flextok_jax.inference import tokenizer as api
from flextok_jax.ops import fsq
from tests.support import numpy_ar
from tests.support import numpy_reference as reference
from tests.support.golden_weights import to_official
from tests.support.random_tokenizer import GROUPS, random_model, with_fields


@pytest.fixture(scope="module")
def model():
  return random_model()


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(1).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def ids():
  return np.random.default_rng(2).integers(0, 64000, (3, 6))


@pytest.fixture(scope="module")
def noise():
  return np.random.default_rng(3).normal(size=(3, 8, 8, 4)).astype(np.float32)


# Golden numbers.


@pytest.fixture(scope="module")
def official(shared):
  """The golden model, loaded as by a user."""
  return flextok_jax.load(shared / "golden" / "flextok_tiny.safetensors", vae_norm_num_groups=4, image_size=64)


@pytest.fixture(scope="module")
def golden(shared):
  arrays = load_file(shared / "golden" / "flextok_tiny_io.safetensors")
  return {k: np.moveaxis(v, -3, -1) if v.ndim >= 4 else v for k, v in arrays.items()}


def close(actual, desired, atol):
  np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=atol)  # tolerances of the golden set


def test_golden_latents_and_tokens(official, golden):
  assert official.image_size == 64 and official.latent_shape == (8, 8, 16)
  assert (official.num_registers, official.num_codes) == (16, 64000)
  close(official.encode_latents(golden["images"]), golden["vae_latents"], 5e-5)
  np.testing.assert_array_equal(official.tokenize(golden["images"]), golden["tokens"])
  np.testing.assert_array_equal(official.tokenize(golden["images"], num_tokens=5), golden["tokens"][:, :5])
  close(official.decode_latents(golden["sample_apg_latent"]), golden["sample_apg_image"], 1e-4)


def test_golden_velocities(official, golden):
  velocity = lambda **kwargs: official.velocity(golden["step_x"], golden["step_t"], golden["tokens"], **kwargs)
  for i in range(3):
    close(velocity(keep_k=golden[f"step_keep{i}"]), golden[f"step_v{i}"], 1e-4)
  close(velocity(), golden["step_v_nokeep"], 1e-4)
  close(velocity(drop_condition=True), golden["step_v_null"], 1e-4)
  mixed = golden["step_null_mixed_mask"].astype(bool)
  close(velocity(keep_k=golden["step_keep0"], drop_condition=mixed), golden["step_v_null_mixed"], 1e-4)
  for t, expected in zip(golden["step_all_t"], golden["step_v_all_t"]):
    close(official.velocity(golden["step_x"], float(t), golden["tokens"], golden["step_keep0"]), expected, 1e-4)


@pytest.mark.parametrize(
  "name, settings",
  [
    ("cfg", dict(guidance="cfg", guidance_scale=3.0)),
    ("apg", {}),  # the defaults are those of the authors
    ("apg_full", dict(guidance_scale=lambda t: 7.5)),
    ("noguid", dict(num_steps=4, guidance="none")),
  ],
)
def test_golden_images(official, golden, name, settings):
  start, keep_k = golden["sample_init_noise"], golden[f"sample_{name}_keep"]
  images = official.detokenize(golden["tokens"], keep_k, noise=start, **settings)
  close(images, golden[f"sample_{name}_image"], 1e-4)
  ragged = [row[:k].tolist() for row, k in zip(golden["tokens"], keep_k)]
  np.testing.assert_array_equal(official.detokenize(ragged, noise=start, **settings), images)


def test_against_numpy(model, images, ids, noise):
  """Gaps as in tests/models/test_reference.py: latents 5e-6, velocities 1e-4, samples 5e-5, decoded by the VAE 2e-4."""
  w = reference.float64(to_official(model.params))
  scale, levels = model.config.vae.scaling_factor, tuple(model.config.tokens.levels)
  mean, _ = reference.vae_encode(w, images.astype(np.float64), GROUPS)
  np.testing.assert_allclose(model.encode_latents(images), scale * mean, atol=1e-4)
  _, expected = reference.fsq_quantize(reference.encode(w, scale * mean), levels)
  np.testing.assert_array_equal(model.tokenize(images), expected)
  codes, keep_k = reference.fsq_lookup(ids, levels), np.array([1, 3, 6])
  t = np.array([0.1, 0.5, 1.0])
  drop = np.array([False, True, False])
  expected = reference.velocity(w, noise, t, codes, keep_k, drop)
  np.testing.assert_allclose(model.velocity(noise, t, ids, keep_k, drop), expected, atol=1e-3)
  latents = reference.sample(w, noise.astype(np.float64), codes, keep_k, 3, "apg", 7.5)[-1]
  expected = reference.vae_decode(w, latents / scale, GROUPS)
  actual = model.detokenize(ids, keep_k, noise=noise, num_steps=3)
  np.testing.assert_allclose(actual, expected, atol=2e-4 * np.abs(expected).max())


# Arguments of several types.


def test_uint8_and_float_images(model):
  pixels = np.random.default_rng(4).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)  # any multiple of the patch size
  ids = model.tokenize(pixels[:, :, :32])
  np.testing.assert_array_equal(ids, model.tokenize(pixels[:, :, :32].astype(np.float32) / 127.5 - 1))
  np.testing.assert_array_equal(ids, model.tokenize(jnp.asarray(pixels[:, :, :32])))
  assert ids.dtype == jnp.int32 and ids.shape == (2, 6)
  np.testing.assert_array_equal(model.tokenize(pixels[:, :, :32], num_tokens=2), ids[:, :2])


def test_lists_of_pictures(model, tmp_path):
  """Greyscale, RGBA, a strip and a path become RGB: shorter side to 32 by bilinear interpolation, centre crop."""
  photo = Image.fromarray(skimage.data.astronaut()).resize((100, 75))
  pictures = [photo, photo.convert("L"), photo.convert("RGBA"), photo.resize((512, 37)), photo.resize((31, 33))]
  photo.save(tmp_path / "photo.png")
  ids = model.tokenize([*pictures, tmp_path / "photo.png", str(tmp_path / "photo.png")])
  assert ids.shape == (7, 6)
  np.testing.assert_array_equal(ids[0], ids[2])
  np.testing.assert_array_equal(ids[0], ids[5])
  np.testing.assert_array_equal(ids[0], ids[6])
  for picture, row in zip(pictures, ids):
    short = min(picture.size)
    size = (32 * picture.width // short, 32 * picture.height // short)
    array = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    top, left = round((array.shape[0] - 32) / 2), round((array.shape[1] - 32) / 2)
    np.testing.assert_array_equal(model.tokenize(array[None, top : top + 32, left : left + 32])[0], row)


def test_ragged_ids_and_keep_k(model, ids, noise):
  decode = lambda *args: np.asarray(model.detokenize(*args, noise=noise, num_steps=3))
  expected = decode(ids, [2, 6, 3])
  np.testing.assert_array_equal(decode([ids[0, :2], ids[1].tolist(), tuple(ids[2, :3])]), expected)
  np.testing.assert_array_equal(decode([ids[0, :2], ids[1], ids[2, :5]], np.array([2, 6, 3])), expected)
  np.testing.assert_array_equal(decode(ids[:, :4]), decode(ids, 4))
  changed = ids.copy()
  changed[0, 2:], changed[2, 3:] = 0, 63999  # past keep_k
  np.testing.assert_array_equal(decode(changed, [2, 6, 3]), expected)


def test_keys_and_noise(model, ids, noise):
  key = jax.random.key(5)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
  drawn = jnp.stack([jax.random.normal(k, (8, 8, 4)) for k in keys])
  with_key = model.detokenize(ids, key=key, num_steps=3)
  np.testing.assert_allclose(with_key, model.detokenize(ids, noise=drawn, num_steps=3), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(model.detokenize(ids, key=keys, num_steps=3), with_key)
  np.testing.assert_array_equal(model.detokenize(ids, key=jax.random.PRNGKey(5), num_steps=3), with_key)
  wide = np.zeros((3, 4, 8, 4), np.float32)  # not the default size: 16 x 32 pixels
  assert model.detokenize(ids, noise=wide, num_steps=1).shape == (3, 16, 32, 3)


def test_posterior_is_sampled_with_a_key(model, images):
  mode = np.asarray(model.encode_latents(images))
  draws = np.stack([model.encode_latents(images, key=jax.random.key(i)) for i in range(40)])
  assert draws.std(0).min() > 0
  w = reference.float64(to_official(model.params))
  _, logvar = reference.vae_encode(w, images.astype(np.float64), GROUPS)
  std = model.config.vae.scaling_factor * np.exp(0.5 * logvar)
  deviation = (draws - mode) / std  # 40 x 768 standard normals
  assert abs(deviation.mean()) < 0.03 and abs(deviation.std() - 1) < 0.03
  first, second, third = (model.tokenize(images, key=jax.random.key(i)) for i in (7, 7, 8))
  np.testing.assert_array_equal(first, second)
  assert (first != third).any()


def test_guidance(model, ids, noise):
  decode = lambda **kwargs: np.asarray(model.detokenize(ids, noise=noise, num_steps=3, **kwargs))
  plain = decode(guidance="none")
  np.testing.assert_array_equal(decode(guidance="apg", guidance_scale=1), plain)
  np.testing.assert_array_equal(decode(guidance="cfg", guidance_scale=lambda t: 1.0), plain)
  np.testing.assert_allclose(decode(guidance="cfg", guidance_scale=1 + 1e-7), plain, atol=1e-3)
  constant = decode(guidance="cfg", guidance_scale=3.0)
  np.testing.assert_array_equal(decode(guidance="cfg", guidance_scale=lambda t: 3.0), constant)
  # Explicit steps, with a scale that depends on t.
  times, x = [], jnp.asarray(noise)
  for t in (1.0, 2 / 3, 1 / 3):
    v_c, v_u = model.velocity(x, t, ids), model.velocity(x, t, ids, drop_condition=True)
    x = x - (v_u + 4 * t * (v_c - v_u)) / 3
  actual = decode(guidance="cfg", guidance_scale=lambda t: times.append(t) or 4 * t)
  expected = np.asarray(model.decode_latents(x))
  np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
  np.testing.assert_allclose(times, [1.0, 2 / 3, 1 / 3])


# A frozen pytree.


def test_model_is_a_frozen_pytree(model, images, ids, noise):
  with pytest.raises(dataclasses.FrozenInstanceError):
    model.params = {}
  leaves, structure = jax.tree.flatten(model)
  assert len(leaves) == len(jax.tree.leaves(model.params)) and jax.tree.unflatten(structure, leaves) == model

  @jax.jit
  def round_trip(model, images, noise):
    ids = model.tokenize(images, num_tokens=3)
    latents = model.encode_latents(images)
    restored = model.detokenize(ids, keep_k=jnp.array([1, 2, 3]), noise=noise, num_steps=3)
    return ids, restored, model.decode_latents(latents)

  tokens, restored, decoded = round_trip(model, jnp.asarray(images), jnp.asarray(noise))
  np.testing.assert_array_equal(tokens, model.tokenize(images, num_tokens=3))
  expected = model.detokenize(tokens, [1, 2, 3], noise=noise, num_steps=3)
  np.testing.assert_allclose(restored, expected, atol=1e-4 * np.abs(expected).max())
  assert decoded.shape == images.shape
  # Differentiable in the parameters, like any function of a pytree.
  loss = lambda model: jnp.square(model.velocity(noise, 0.5, ids)).mean()
  assert float(jnp.abs(jax.grad(loss)(model).params["decoder"]["patch_embed"]["kernel"]).max()) > 0


def test_each_method_compiles_once_per_shape(model, images, ids, noise):
  functions = (
    programs.tokenize,
    programs.encode_latents,
    programs.decode_latents,
    programs.velocity,
    programs.detokenize,
  )
  for f in functions:
    f.clear_cache()
  for i in range(3):
    model.tokenize(images + 0.01 * i)
    model.encode_latents(images)
    model.decode_latents(noise)
    model.velocity(noise, 0.1 + 0.2 * i, ids, keep_k=i + 1, drop_condition=i == 1)
    model.detokenize(ids[:, : i + 2], noise=noise, num_steps=2, guidance_scale=2.0 + i)  # nor per count or scale
    model.detokenize([row[: i + 1] for row in ids], noise=noise, num_steps=2, guidance_scale=lambda t, i=i: 1 + i + t)
  assert [f._cache_size() for f in functions] == [1] * 5


# Other sizes and shapes.


@pytest.fixture(scope="module")
def scaled(model, tmp_path_factory):
  """The model with positions that are scaled to any grid."""
  path = tmp_path_factory.mktemp("scaled") / "model.safetensors"
  model.save(path)
  with pytest.raises(ValueError, match="posemb_scaling must be one of absolute, interpolate, scaled, got 'crop'"):
    flextok_jax.load(path, posemb_scaling="crop")
  return flextok_jax.load(path, posemb_scaling="scaled")


def test_wide_images_against_numpy(model, scaled, images):
  """2:1. Square images have the same ids as before."""
  np.testing.assert_array_equal(scaled.tokenize(images), model.tokenize(images))
  wide = np.concatenate([images, images[::-1]], 2)  # [3, 32, 64, 3]
  w, options = reference.float64(to_official(model.params)), reference.Options(posemb_scaling="scaled", max_grid=4)
  scale, levels = model.config.vae.scaling_factor, tuple(model.config.tokens.levels)
  z = reference.encode(w, scale * reference.vae_encode(w, wide.astype(np.float64), GROUPS)[0], options=options)
  ids = scaled.tokenize(wide)
  np.testing.assert_array_equal(ids, reference.fsq_quantize(z, levels)[1])
  assert scaled.latent_shape_of((32, 64)) == (8, 16, 4)
  decoded = scaled.detokenize(ids, size=(32, 64), key=jax.random.key(0), num_steps=2)
  assert decoded.shape == wide.shape
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(3))
  noise = programs.sample_noise(keys, (8, 16, 4))
  np.testing.assert_array_equal(decoded, scaled.detokenize(ids, noise=noise, num_steps=2))
  codes, t, keep_k, drop = (
    reference.fsq_lookup(np.asarray(ids), levels),
    np.full(3, 0.5),
    np.full(3, 6),
    np.zeros(3, bool),
  )
  expected = reference.velocity(w, np.asarray(noise), t, codes, keep_k, drop, options=options)
  np.testing.assert_allclose(scaled.velocity(noise, t, ids), expected, atol=1e-3)


def test_pictures_of_several_shapes(scaled, tmp_path):
  """Whatever their order, each has the ids of its own pixels, at the area of training."""
  photo = Image.fromarray(skimage.data.astronaut())
  pictures = [photo.resize(size) for size in ((64, 32), (96, 96), (40, 80), (128, 64), (900, 3))]
  pictures[2].save(tmp_path / "tall.png")
  groups = scaled.rows_by_size([*pictures, tmp_path / "tall.png"], "fit")
  assert groups == {(24, 48): [0, 3], (32, 32): [1], (48, 24): [2, 5], (8, 128): [4]}
  ids = scaled.tokenize([*pictures, tmp_path / "tall.png"], resize="fit")
  assert ids.shape == (6, 6)
  for size, rows in groups.items():
    given = [pictures[i % 5 if i < 5 else 2] for i in rows]
    pixels = np.stack([np.asarray(x.resize(size[::-1], Image.Resampling.BILINEAR)) for x in given])
    np.testing.assert_array_equal(ids[np.array(rows)], scaled.tokenize(pixels))
  np.testing.assert_array_equal(
    scaled.tokenize(pictures[:1], resize="none")[0], scaled.tokenize(np.asarray(pictures[0])[None])[0]
  )
  given = dict(quality=0.5, num_steps=1, guidance="none")
  short = scaled.tokenize(pictures[:3], resize="fit", batch_size=2, **given)
  alone = [scaled.tokenize([x], resize="fit", **given)[0] for x in pictures[:3]]
  assert [row.tolist() for row in short] == [row.tolist() for row in alone]


def test_latents_of_pictures_of_several_shapes(scaled):
  photo = Image.fromarray(skimage.data.astronaut())
  pictures = [photo.resize(size) for size in ((64, 32), (96, 96), (128, 64))]
  latents = scaled.encode_latents(pictures, resize="fit")
  assert [x.shape for x in latents] == [(6, 12, 4), (8, 8, 4), (6, 12, 4)]
  for picture, (height, width), found in zip(pictures, ((24, 48), (32, 32), (24, 48)), latents):
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(found, scaled.encode_latents(pixels[None])[0], atol=1e-5)
  (own,) = scaled.encode_latents(pictures[:1], resize="none")
  np.testing.assert_array_equal(own, scaled.encode_latents(np.asarray(pictures[0])[None])[0])
  assert scaled.encode_latents(pictures).shape == (3, 8, 8, 4)  # cropped
  drawn = scaled.encode_latents(pictures, jax.random.key(1), resize="fit")
  keys = [jax.random.fold_in(jax.random.key(1), i) for i in (0, 1)]
  np.testing.assert_array_equal(drawn[1], scaled.encode_latents(pictures[1:2], keys[1], resize="fit")[0])
  pair = scaled.encode_latents([pictures[0], pictures[2]], keys[0], resize="fit")
  assert np.array_equal(drawn[0], pair[0]) and np.array_equal(drawn[2], pair[1])
  with pytest.raises(ValueError, match="images is an empty list"):
    scaled.encode_latents([], resize="fit")
  with pytest.raises(ValueError, match="resize='fill'"):
    scaled.encode_latents(pictures, resize="fill")


# Rejected arguments: one line that names the argument.

KEY = dict(key=jax.random.key(0))
BAD = [
  (r"images must be a list of images or an array, got a str", lambda m: m.tokenize("photo.png")),
  (r"the image /absent.png cannot be read", lambda m: m.tokenize(["/absent.png"])),
  (r"images is an empty list", lambda m: m.tokenize([])),
  (r"a list of images holds Pillow images or paths, got a ndarray", lambda m: m.tokenize([np.zeros((32, 32, 3))])),
  (r"shape \[b, h, w, 3\], got \[32, 32, 3\]", lambda m: m.tokenize(np.zeros((32, 32, 3), np.uint8))),
  (r"shape \[b, h, w, 3\], got \[1, 32, 32, 4\]", lambda m: m.tokenize(np.zeros((1, 32, 32, 4), np.uint8))),
  (r"got int64", lambda m: m.tokenize(np.zeros((1, 32, 32, 3), np.int64))),
  (r"lie in \[-1, 1\], got 0.0 to 255.0", lambda m: m.encode_latents(np.eye(32)[None, :, :, None] * np.full(3, 255.0))),
  (r"lie in \[-1, 1\], got nan", lambda m: m.tokenize(np.full((1, 32, 32, 3), np.nan))),
  (r"30 x 32 pixels: sides must be multiples of 8", lambda m: m.tokenize(np.zeros((1, 30, 32, 3), np.uint8))),
  (r"5 x 4 patches does not fit max_grid 4", lambda m: m.tokenize(np.zeros((1, 40, 32, 3), np.uint8))),
  (r"resize='pad' must be crop, fit or none", lambda m: m.tokenize([], resize="pad")),
  (
    r"6 x 3 patches does not fit max_grid 4: .*'scaled'",
    lambda m: m.tokenize([Image.new("RGB", (9, 18))], resize="fit"),
  ),
  (r"30 x 32 pixels: .* resize='fit'", lambda m: m.tokenize([Image.new("RGB", (32, 30))], resize="none")),
  (r"size=32 must be \(height, width\) in pixels", lambda m: m.detokenize([[1]], size=32, **KEY)),
  (r"size=0 must be a whole number from 1 to 4096", lambda m: m.detokenize([[1]], size=(0, 32), **KEY)),
  (r"36 x 32 pixels: sides must be multiples of 8", lambda m: m.detokenize([[1]], size=(36, 32), **KEY)),
  (r"8 x 4 patches does not fit max_grid 4", lambda m: m.detokenize([[1]], size=(64, 32), **KEY)),
  (
    r"size=\(16, 16\) needs noise of shape \[1, 4, 4, 4\], got \[1, 8, 8, 4\]",
    lambda m: m.detokenize([[1]], size=(16, 16), noise=np.zeros((1, 8, 8, 4))),
  ),
  (r"num_tokens=0 must be a whole number from 1 to 6", lambda m: m.tokenize(np.zeros((1, 32, 32, 3), np.uint8), 0)),
  (r"num_tokens=7 must", lambda m: m.tokenize(np.zeros((1, 32, 32, 3), np.uint8), num_tokens=7)),
  (r"num_tokens=2.0 must", lambda m: m.tokenize(np.zeros((1, 32, 32, 3), np.uint8), num_tokens=2.0)),
  (r"pass key=jax.random.key\(seed\), or noise=... of shape \[2, 8, 8, 4\]", lambda m: m.detokenize([[1], [2]])),
  (r"noise must be 1 latents", lambda m: m.detokenize([[1]], noise=np.zeros((2, 8, 8, 4)))),
  (r"multiples of 2; got shape \[1, 7, 8, 4\]", lambda m: m.detokenize([[1]], noise=np.zeros((1, 7, 8, 4)))),
  (
    r"noise must have shape \[b, h, w, 4\], got \[1, 8, 8, 3\]",
    lambda m: m.detokenize([[1]], noise=np.zeros((1, 8, 8, 3))),
  ),
  (r"token id 64000 is out of range: ids are 0 to 63999", lambda m: m.detokenize([[64000]], **KEY)),
  (r"token id -1 is out of range", lambda m: m.detokenize(np.array([[-1, 5]]), **KEY)),
  (r"a sequence has 1 to 6 ids, got \[7\]", lambda m: m.detokenize([[1] * 7], **KEY)),
  (r"a sequence has 1 to 6 ids, got \[0, 2\]", lambda m: m.detokenize([[1, 2], []], **KEY)),
  (r"list of sequences of whole numbers", lambda m: m.detokenize([[1.5]], **KEY)),
  (r"list of sequences of whole numbers", lambda m: m.detokenize([], **KEY)),
  (r"list of sequences of whole numbers", lambda m: m.detokenize([1, 2], **KEY)),
  (r"ids must be integers \[b, n\], got float32", lambda m: m.detokenize(np.zeros((1, 2), np.float32), **KEY)),
  (r"keep_k=0 of sample 0 must lie between 1 and its 2", lambda m: m.detokenize([[1, 2]], 0, **KEY)),
  (r"keep_k=3 of sample 1 must lie between 1 and its 2", lambda m: m.detokenize([[1, 2, 3], [1, 2]], 3, **KEY)),
  (r"keep_k must be one int32, or one for each of 1 samples", lambda m: m.detokenize([[1]], [1, 1], **KEY)),
  (r"keep_k must be one int32", lambda m: m.detokenize([[1]], 1.0, **KEY)),
  (r"num_steps=0 must", lambda m: m.detokenize([[1]], **KEY, num_steps=0)),
  (r"unknown guidance 'agp': one of apg, cfg, none", lambda m: m.detokenize([[1]], **KEY, guidance="agp")),
  (
    r"guidance_scale=nan must be a number from 0 to 1e\+06",
    lambda m: m.detokenize([[1]], **KEY, guidance_scale=np.nan),
  ),
  (r"images must be an array of numpy or jax, or a list of images, got a NoneType", lambda m: m.tokenize(None)),
  (r"images must be an array .* got a generator", lambda m: m.tokenize(x for x in "ab")),
  (r"lie in \[-1, 1\], got 255.0 to 255.0", lambda m: m.tokenize(jnp.full((1, 32, 32, 3), 255.0))),
  (r"lie in \[-1, 1\], got nan", lambda m: m.tokenize(jnp.full((1, 32, 32, 3), jnp.nan))),
  (r"lie in \[-1, 1\], got nan", lambda m: m.tokenize(jnp.full((1, 32, 32, 3), jnp.nan, jnp.bfloat16))),
  (r"lie in \[-1, 1\], got -inf to 0", lambda m: m.encode_latents(np.full((1, 32, 32, 3), [0.0, -np.inf, 0.0]))),
  (r"key must be a key like", lambda m: m.tokenize(np.zeros((1, 32, 32, 3), np.uint8), key=0.5)),
  (
    r"key must be one key",
    lambda m: m.encode_latents(np.zeros((1, 32, 32, 3), np.uint8), jax.random.split(KEY["key"])),
  ),
  (r"key must be a key like", lambda m: m.detokenize([[1]], key="0")),
  (r"list of sequences of whole numbers, got None", lambda m: m.detokenize(None, **KEY)),
  (r"list of sequences of whole numbers, got 5", lambda m: m.detokenize(5, **KEY)),
  (r"ids=\[1, \[2\]\] must be an array of numbers", lambda m: m.detokenize([[1, [2]]], **KEY)),
  (r"a sequence has 1 to 6 ids, got \[1000000\]", lambda m: m.detokenize([np.zeros(10**6, int)] * 1000, **KEY)),
  (r"keep_k=4294967297 of sample 0", lambda m: m.detokenize([[1]], np.uint64(2**32 + 1), **KEY)),
  (r"keep_k=\[None\] must be an array of numbers", lambda m: m.detokenize([[1]], [None], **KEY)),
  (r"noise must be finite", lambda m: m.detokenize([[1]], noise=np.full((1, 8, 8, 4), np.nan))),
  (r"noise must be finite", lambda m: m.detokenize([[1]], noise=jnp.full((1, 8, 8, 4), -jnp.inf))),
  (r"noise=.* must be an array of numbers", lambda m: m.detokenize([[1]], noise=np.full((1, 8, 8, 4), None))),
  (r"x_t must be finite", lambda m: m.velocity(np.full((1, 8, 8, 4), np.inf), 0.5, [[1]])),
  (r"t=None must be an array of numbers", lambda m: m.velocity(np.zeros((1, 8, 8, 4)), None, [[1]])),
  (r"z must be finite", lambda m: m.decode_latents(np.full((1, 8, 8, 4), np.nan))),
  (r"num_steps=True must be a whole number from 1 to 10000", lambda m: m.detokenize([[1]], **KEY, num_steps=True)),
  (r"num_steps=100000000 must be .* from 1 to 10000", lambda m: m.detokenize([[1]], **KEY, num_steps=10**8)),
  (r"num_steps='5' must", lambda m: m.detokenize([[1]], **KEY, num_steps="5")),
  (r"unknown guidance array", lambda m: m.detokenize([[1]], **KEY, guidance=np.arange(2))),
  (r"guidance_scale=-1 must be a number from 0", lambda m: m.detokenize([[1]], **KEY, guidance_scale=-1)),
  (r"guidance_scale=1e\+39 must", lambda m: m.detokenize([[1]], **KEY, guidance_scale=1e39)),
  (r"guidance_scale=None must be a number", lambda m: m.detokenize([[1]], **KEY, guidance_scale=lambda t: None)),
  (r"guidance_scale=-0.5 must", lambda m: m.detokenize([[1]], **KEY, guidance_scale=lambda t: t - 1, num_steps=2)),
  (r"guidance_interval=0.5 must be two times", lambda m: m.detokenize([[1]], **KEY, guidance_interval=0.5)),
  (r"guidance_interval=\(None, 1\) must", lambda m: m.detokenize([[1]], **KEY, guidance_interval=(None, 1))),
  (r"guidance_interval=\(0, nan\) must", lambda m: m.detokenize([[1]], **KEY, guidance_interval=(0, np.nan))),
  (r"path=None must be a path", lambda m: m.to_official(None)),
  (r"z must have shape \[b, h, w, 4\], got \[8, 8, 4\]", lambda m: m.decode_latents(np.zeros((8, 8, 4)))),
  (r"t must lie in \[0, 1\], got \[1.5\]", lambda m: m.velocity(np.zeros((1, 8, 8, 4)), 1.5, [[1]])),
  (r"drop_condition must be one bool", lambda m: m.velocity(np.zeros((1, 8, 8, 4)), 0.5, [[1]], drop_condition=2)),
]


@pytest.mark.parametrize("pattern, call", BAD, ids=range(len(BAD)))
def test_bad_arguments(model, pattern, call):
  with pytest.raises(ValueError, match=pattern) as error:
    call(model)
  assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_64_bit_mode_changes_nothing(model, images):
  """With jax_enable_x64, and float64 arguments, types and numbers are the same."""
  gen = numpy_ar.tiny_generator(depth=1, stop=True)

  def run():
    ids = model.tokenize(images.astype(np.float64), key=jax.random.key(1))
    picture = model.detokenize(ids, key=jax.random.key(2), num_steps=2)
    drawn, log_probs = gen.generate(
      jax.random.key(3), labels=[0, 4], guidance_scale=2.0, top_p=0.9, return_log_probs=True
    )
    again = gen.generate(jax.random.key(3), labels=[0, 4], prefix=[[1], [2]], greedy=True, fast=False)
    noise = np.random.default_rng(0).normal(size=(3, 8, 8, 4))
    other = model.velocity(noise, np.float64(0.5), ids, [1, 2, 6])
    lengths = model.tokenize(images[:1], quality=1.0, num_steps=1)
    return ids, picture, drawn, log_probs, again, other, *gen.trim(drawn), *lengths

  expected = run()
  with jax.enable_x64(True):
    actual = run()
  for x, y in zip(actual, expected, strict=True):
    assert x.dtype == y.dtype and x.dtype in (np.int32, np.float32)
    np.testing.assert_array_equal(x, y) if x.dtype == np.int32 else np.testing.assert_allclose(
      x, y, rtol=1e-5, atol=1e-5
    )


def test_many_steps_are_taken_in_chunks(model, ids, noise, monkeypatch):
  """The pictures are those of one program, and Ctrl-C is noticed between the chunks."""
  settings = dict(noise=noise, num_steps=np.int64(5), guidance_interval=(0.5, 1))
  expected = model.detokenize(ids, **settings)
  monkeypatch.setattr(programs, "CHUNK_STEPS", 2)
  programs.sample_steps.clear_cache()
  np.testing.assert_allclose(model.detokenize(ids, **settings), expected, rtol=1e-5, atol=1e-5)
  assert programs.sample_steps._cache_size() == 3  # 2 guided, 1 guided, 2 others
  calls, wait = [], jax.block_until_ready

  def interrupted(x):
    calls.append(wait(x))
    raise KeyboardInterrupt

  monkeypatch.setattr(jax, "block_until_ready", interrupted)
  with pytest.raises(KeyboardInterrupt):
    model.detokenize(ids, **settings)
  assert len(calls) == 1


def test_a_vae_has_latents_but_no_tokens(model, images):
  vae = api.FlexTok({"vae": model.params["vae"]}, with_fields(model, stage="vae"))
  np.testing.assert_array_equal(vae.encode_latents(images), model.encode_latents(images))
  np.testing.assert_array_equal(vae.decode_latents(np.ones((1, 8, 8, 4))), model.decode_latents(np.ones((1, 8, 8, 4))))
  for call in (lambda: vae.tokenize(images), lambda: vae.detokenize([[1]]), lambda: vae.num_registers):
    with pytest.raises(ValueError, match="stage 'vae': it has latents, but no tokens"):
      call()


def test_bfloat16_is_close_to_float32(model, images, ids, noise):
  """Types are as requested, FSQ and sampler are float32, and values are within a few multiples of bfloat16's 3e-3."""
  cast = lambda path, x: x if path[0].key == "vae" else x.astype(jnp.bfloat16)
  params = jax.tree_util.tree_map_with_path(cast, model.params)
  low = api.FlexTok(params, with_fields(model, dtype="bfloat16"))
  exact, v = (m.velocity(noise, 0.5, ids) for m in (model, low))
  assert v.dtype == jnp.float32
  assert float(jnp.abs(v - exact).mean() / jnp.abs(exact).mean()) < 0.05
  codes = [fsq.ids_to_codes(m.tokenize(images), m.config.tokens.levels) for m in (model, low)]
  assert float(jnp.abs(codes[0] - codes[1]).mean()) < 0.1  # out of 2: a few round to the neighbouring level
  assert low.detokenize(ids, noise=noise, num_steps=1).dtype == jnp.float32


def test_only_public_names_are_exported():
  names = ["ARGenerator", "FlexTok", "UniformPrior", "__version__", "load", "load_ar", "show_grid", "to_pil"]
  assert sorted(flextok_jax.__all__) == names == dir(flextok_jax)
  assert flextok_jax.load is api.load and flextok_jax.FlexTok is api.FlexTok
  assert flextok_jax.load_ar is generation.load_ar and flextok_jax.ARGenerator is generation.ARGenerator
  with pytest.raises(AttributeError, match="no attribute 'laod'"):
    flextok_jax.laod  # noqa: B018


# What people try first.


def test_models_that_ship_load_by_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  model, gen = flextok_jax.load("shapes"), flextok_jax.load_ar("shapes_ar")
  assert repr(model) == "FlexTok(32 px, 16 tokens of 1,000 codes, 2.5M parameters, float32)"
  assert repr(gen) == "ARGenerator(16 tokens of 1,000 ids, by class, 1.1M parameters, float32)"
  with pytest.raises(FileNotFoundError, match="no such checkpoint: shapez.* ships: glyphs, glyphs_groups, "):
    flextok_jax.load("shapez")
  with pytest.raises(ValueError, match="shapes_ar is a generator: load it by flextok_jax.load_ar"):
    flextok_jax.load("shapes_ar")
  model.save("shapes_student")  # a folder of that name is meant
  assert flextok_jax.load("shapes_student").config == model.config


def test_a_seed_is_a_key(model, ids):
  expected = model.detokenize(ids, key=jax.random.key(3), num_steps=1)
  np.testing.assert_array_equal(model.detokenize(ids, key=3, num_steps=1), expected)
  for key in (-1, True, 2**32, 1.5):
    with pytest.raises(ValueError, match="key must be a key|seed=.* must be a whole number"):
      model.detokenize(ids, key=key)


def test_images_in_the_unit_range_are_named_once(model, images, monkeypatch):
  seen = []
  monkeypatch.setattr(errors, "_warned", set())
  monkeypatch.setattr(errors.logging, "warning", lambda text, *args: seen.append(text % args))
  for scaled in (images, (images + 1) / 2, (images + 1) / 2):
    model.encode_latents(scaled)
  assert len(seen) == 1 and "these lie in [0, 1]: if that is their range, give 2 x - 1" in seen[0]


def test_pictures(images):
  pictures = flextok_jax.to_pil(images)
  assert [picture.size for picture in pictures] == [(32, 32)] * 3
  np.testing.assert_allclose(np.asarray(pictures[1]), np.clip((images[1] + 1) * 127.5, 0, 255), atol=0.5)
  assert flextok_jax.to_pil(np.asarray(pictures[0]))[0] == pictures[0]
  wide, tall = flextok_jax.show_grid(images, ["a", "b", "c"]), flextok_jax.show_grid(images, columns=1)
  assert wide.width > tall.width and wide.height < tall.height
  with pytest.raises(ValueError, match="2 labels for 3 images"):
    flextok_jax.show_grid(images, ["a", "b"])
  with pytest.raises(ValueError, match=r"images must have shape \[b, h, w, 3\] or \[h, w, 3\], got \[32, 32\]"):
    flextok_jax.to_pil(images[0, ..., 0])


def test_batches_of_any_size_give_the_same_ids_and_images(model, images, ids, noise, tmp_path, capsys):
  expected = np.asarray(model.tokenize(images))
  before = programs.tokenize._cache_size()
  np.testing.assert_array_equal(model.tokenize(images, batch_size=2), expected)
  assert programs.tokenize._cache_size() == before + 1  # the batch that is not full is padded
  paths = []
  for i, image in enumerate(np.round((images + 1) * 127.5).astype(np.uint8)):
    paths.append(tmp_path / f"{i}.png")
    Image.fromarray(image).save(paths[-1])
  np.testing.assert_array_equal(model.tokenize(paths, batch_size=2, progress=True), model.tokenize(paths))
  assert "images encoded: 100%" in capsys.readouterr().err
  with pytest.raises(ValueError, match="the image .*absent.png cannot be read"):
    model.tokenize([*paths, tmp_path / "absent.png"], batch_size=2)

  settings = dict(quality=0.5, noise=noise, num_steps=2)
  for found, row in zip(model.tokenize(images, **settings, batch_size=2), model.tokenize(images, **settings)):
    np.testing.assert_array_equal(found, row)

  for start in (dict(key=jax.random.key(1)), dict(noise=noise)):
    expected = model.detokenize(ids, [6, 2, 1], **start, num_steps=2)
    found = model.detokenize(ids, [6, 2, 1], **start, num_steps=2, batch_size=2, progress=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
  assert "images decoded: 100%" in capsys.readouterr().err
  assert capsys.readouterr().out == ""
  for call in (lambda: model.tokenize(images, batch_size=0), lambda: model.detokenize(ids, key=1, batch_size=0)):
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
      call()
