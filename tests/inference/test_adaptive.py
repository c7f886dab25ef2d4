"""Adaptive length: the search against brute force, distances against numpy, and the API end to end."""

import math

from flax.core import meta
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np
import pytest
import skimage.data
import skimage.filters
import skimage.transform

from flextok_jax import config as common
from flextok_jax.config import with_fields
from flextok_jax.evals.metrics import image as image_metrics
from flextok_jax.evals.studies import halting
from flextok_jax.evals.studies.subject import Subject
from flextok_jax.inference import adaptive, decoding, programs
from flextok_jax.inference import tokenizer as api
from flextok_jax.ops import distances
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage

# The search. A table [b, n] has the distance of each prefix; the fake decoder paints it, the fake metric reads it.

SIZES = (1, 2, 3, 5, 8, 16, 37, 256)
BATCH = 64


def far(images, restored):
  return jnp.abs(restored - images)[:, 0, 0, 0]


def searcher(function):
  """Returns (table, threshold) -> (the search's results as numpy arrays, the lengths it decoded [rounds, b])."""
  tried = []

  @jax.jit
  def run(table, threshold):
    batch, most = table.shape

    def decode(ids, keep_k):
      assert ids.shape == table.shape and keep_k.dtype == jnp.int32
      jax.debug.callback(lambda k: tried.append(np.asarray(k)), keep_k)
      value = jnp.take_along_axis(table, keep_k[:, None] - 1, 1)
      return jnp.broadcast_to(value[:, :, None, None], (batch, 2, 2, 3))

    return function(decode, far, jnp.zeros((batch, 2, 2, 3)), jnp.zeros((batch, most), jnp.int32), threshold)

  def search(table, threshold):
    tried.clear()
    found = jax.tree.map(np.asarray, run(table, threshold))
    jax.effects_barrier()
    return found, np.asarray(tried).reshape(-1, len(table))

  return search


def tables(most):
  """Returns distances in (0, 1): a decreasing table and an unsorted one."""
  rng = np.random.default_rng(most)
  table = rng.uniform(0.01, 0.99, (BATCH, most)).astype(np.float32)
  return np.sort(table, 1)[:, ::-1].copy(), table


@pytest.mark.parametrize("most", SIZES)
def test_search_of_decreasing_distances_equals_brute_force(most):
  table, _ = tables(most)
  rounds = math.ceil(math.log2(most))
  prefix, length = searcher(adaptive.shortest_prefix), searcher(adaptive.shortest_length)
  for threshold in (0.0, 0.02, 0.3, 0.6, 1.0):  # no prefix meets the first, all prefixes meet the last
    within = table <= threshold
    expected = np.where(within.any(1), within.argmax(1) + 1, most)
    (lengths, gaps), tried = prefix(table, threshold)
    np.testing.assert_array_equal(lengths, expected)
    np.testing.assert_array_equal(gaps, table[np.arange(BATCH), lengths - 1])
    assert lengths.dtype == np.int32 and gaps.dtype == np.float32
    assert len(tried) <= rounds + (lengths == most).any()
    alone, tried = length(table, threshold)
    np.testing.assert_array_equal(alone, expected)
    assert len(tried) <= rounds  # whether all tokens suffice does not affect the length


@pytest.mark.parametrize("most", SIZES)
def test_search_of_unsorted_distances_returns_measured_values(most):
  _, table = tables(most)
  table[::5, most // 2 :] = np.nan  # a decoder that diverges
  thresholds = np.linspace(0.02, 0.98, BATCH, dtype=np.float32)  # one per image
  (lengths, gaps), tried = searcher(adaptive.shortest_prefix)(table, thresholds)
  np.testing.assert_array_equal(gaps, table[np.arange(BATCH), lengths - 1])
  assert ((lengths == tried).any(0)).all()
  assert ((gaps <= thresholds) | (lengths == most)).all()
  missed = ~(gaps <= thresholds)
  assert not (table[np.arange(BATCH), tried - 1] <= thresholds)[:, missed].any()  # no prefix that was tried meets it


def test_search_rejects_invalid_distances():
  images, ids = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 4), jnp.int32)
  decode = lambda ids, keep_k: images
  bad = [
    (r"number per image, \[2\] here; got float32 \[\]", lambda a, b: jnp.mean(a - b)),
    (r"got float32 \[2, 8, 8\]", lambda a, b: jnp.mean(a - b, -1)),
    (r"got int32 \[2\]", lambda a, b: jnp.zeros(2, jnp.int32)),
    (r"got tuple", lambda a, b: (distances.mse(a, b), 1.0)),
  ]
  for pattern, distance in bad:
    with pytest.raises(ValueError, match=pattern):
      adaptive.shortest_prefix(decode, distance, images, ids, 0.1)
  with pytest.raises(ValueError, match=r"decode to images \[2, 4, 4, 3\], which cannot be compared"):
    adaptive.shortest_prefix(lambda *_: images[:, ::2, ::2], distances.mse, images, ids, 0.1)


# Distances.


@pytest.fixture(scope="module")
def pictures():
  """Returns {side: two photographs, a constant image and an edge, float32 [4, side, side, 3]}."""
  photos = [skimage.data.astronaut(), skimage.data.coffee()]

  def at(side):
    rows = [skimage.transform.resize(photo, (side, side), anti_aliasing=True) * 2 - 1 for photo in photos]
    edge = np.full((side, side, 3), -0.5)
    edge[:, side // 2 :] = 0.7
    return np.stack([*rows, np.full_like(edge, 0.3), edge]).astype(np.float32)

  return {side: at(side) for side in (32, 256)}


measure = jax.jit(lambda a, b: {name: distance(a, b) for name, distance in distances.DISTANCES.items()})


def reference_perceptual(a, b):
  """The perceptual distance of two images [h, w, 3] in float64, with each filter as a matrix of 5x5 weights."""
  smooth, slope, curve = np.array([1, 4, 6, 4, 1]) / 16, np.array([-1, -2, 0, 2, 1]) / 8, np.array([1, 0, -2, 0, 1]) / 4
  outer = [
    np.outer(smooth, slope),
    np.outer(slope, smooth),
    np.outer(smooth, curve),
    np.outer(curve, smooth),
    np.sqrt(2) * np.outer(slope, slope),
  ]

  def respond(x, kernel):
    padded = np.pad(x, ((2, 2), (2, 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (0, 1))
    return np.einsum("hwcij,ij->hwc", windows, kernel)

  def unit(features, floor):
    features = np.concatenate([*features, np.full((*features[0].shape[:2], 1), floor)], -1)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)

  def layers(x):
    return unit([respond(x, np.outer(smooth, smooth))], 1.0), unit([respond(x, kernel) for kernel in outer], 0.2)

  mix = np.array([[1 / 3, 1 / 3, 1 / 3], [1 / 2, -1 / 2, 0], [-1 / 4, -1 / 4, 1 / 2]])
  a, b = (np.float64(x) @ mix.T for x in (a, b))
  total = 0.0
  while True:
    total += sum(((x - y) ** 2).sum(-1).mean() for x, y in zip(layers(a), layers(b)))
    if min(a.shape[:2]) < 16:
      return total
    h, w = a.shape[0] // 2 * 2, a.shape[1] // 2 * 2
    a, b = (x[:h, :w].reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3)) for x in (a, b))


@pytest.mark.parametrize("shape", [(32, 32), (37, 50), (6, 9)], ids=["square", "odd", "small"])
def test_distances_equal_numpy(shape):
  a, b = np.random.default_rng(0).uniform(-1, 1, (2, 3, *shape, 3)).astype(np.float32)
  b[1] = a[1] + 0.05 * b[1]
  got = measure(a, b)
  np.testing.assert_allclose(got["mse"], np.square(np.float64(a) - b).mean((1, 2, 3)), rtol=1e-5)
  np.testing.assert_allclose(got["perceptual"], [reference_perceptual(*pair) for pair in zip(a, b)], rtol=1e-4)


@pytest.mark.parametrize("side", [32, 256])
def test_distances_are_symmetric_and_zero_for_equal_images(pictures, side):
  x = pictures[side]
  for name, values in measure(x, x).items():
    np.testing.assert_array_equal(values, np.zeros(len(x)), err_msg=name)
  y = x[::-1]
  both, swapped = measure(x, y), measure(y, x)
  turned = measure(x.swapaxes(1, 2)[:, ::-1], y.swapaxes(1, 2)[:, ::-1])  # no direction is preferred
  for name, values in both.items():
    assert values.dtype == jnp.float32 and (np.asarray(values) > 0).all()
    np.testing.assert_array_equal(values, swapped[name])
    np.testing.assert_allclose(turned[name], values, rtol=1e-4)


KINDS = ("noise", "blur", "shift", "brightness", "colour")


@pytest.mark.parametrize("kind, side", [*((kind, 32) for kind in KINDS), ("noise", 256), ("shift", 256)])
def test_distances_increase_with_damage(pictures, kind, side):
  x = pictures[side]
  noise = np.random.default_rng(1).normal(size=x.shape)
  blur = lambda s: np.stack([skimage.filters.gaussian(image, s, channel_axis=-1) for image in x])
  damage = {
    "noise": lambda s: x + 0.03 * s * noise,
    "blur": lambda s: blur(0.7 * s),
    "shift": lambda s: np.concatenate([x[:, :, :1].repeat(s, 2), x[:, :, :-s]], 2),
    "brightness": lambda s: x + 0.05 * s,
    "colour": lambda s: x + 0.05 * s * np.array([1, -1, 0]),
  }[kind]
  steps = [measure(x, damage(s).astype(np.float32)) for s in (1, 2, 4)]
  rows = [0, 1, 3] if kind in ("blur", "shift") else [0, 1, 2, 3]  # a constant image has no edges to lose
  for name in distances.DISTANCES:
    values = np.stack([np.asarray(step[name]) for step in steps])[:, rows]
    assert (values[0] > 0).all() and (np.diff(values, axis=0) > 0).all(), (name, values)


def test_perceptual_distance_differs_from_mse(pictures):
  """Lost texture is worse than a change of shade with the same mse."""
  x = pictures[256]
  blurred = np.stack([skimage.filters.gaussian(image, 2, channel_axis=-1) for image in x]).astype(np.float32)
  shade = np.sqrt(np.asarray(measure(x, blurred)["mse"]))[:, None, None, None]
  a, b = measure(x, blurred), measure(x, x + shade)
  np.testing.assert_allclose(a["mse"], b["mse"], rtol=1e-3)
  assert (np.asarray(a["perceptual"]) > 1.3 * np.asarray(b["perceptual"]))[:2].all()  # for the photographs


@pytest.mark.parametrize("shape", [(32, 32), (37, 50), (6, 9)], ids=["square", "odd", "small"])
def test_detail_equals_numpy(shape):
  a, b = np.random.default_rng(0).uniform(-1, 1, (2, 3, *shape, 3)).astype(np.float32)
  b[1] = a[1] + 0.05 * b[1]

  def windows(x, axis):
    steps = np.abs(np.diff(np.float64(x), axis=axis))  # [h, w, c]
    sides = [min(16, side) for side in steps.shape[:2]]
    every = np.lib.stride_tricks.sliding_window_view(steps, sides, (0, 1))
    return every[:: sides[0] // 2, :: sides[1] // 2].mean((-2, -1))

  expected = [np.mean([np.abs(windows(x, i) - windows(y, i)).mean() for i in (0, 1)]) for x, y in zip(a, b)]
  np.testing.assert_allclose(jax.jit(distances.detail)(a, b), expected, rtol=1e-5, atol=2e-7)  # of means near 0.7


def test_detail_is_of_strength_and_not_of_pattern(pictures):
  x = pictures[256][:2]
  blurred = np.stack([skimage.filters.gaussian(image, 1, channel_axis=-1) for image in x]).astype(np.float32)
  lost = np.asarray(distances.detail(x, blurred))
  assert (lost > 10 * np.asarray(distances.detail(x, 0.1 - x))).all()  # the negative has the same detail
  board = np.indices((32, 32)).sum(0)[None, ..., None] % 2 * np.ones(3, np.float32)  # 1 apart everywhere
  np.testing.assert_allclose(distances.detail(board, 1 - board), 0, atol=1e-6)
  np.testing.assert_allclose(distances.detail(board, np.zeros_like(board)), 1, rtol=1e-6)


# End to end.

QUIET = dict(num_steps=2, guidance="cfg", guidance_scale=1.5)


@pytest.fixture(scope="module")
def model():
  """A pixel-space tokenizer of 9 registers for 16 px images, which gives two slot counts; random weights."""
  part = dict(width=32, depth=1, head_dim=16, patch_size=4)
  config = common.derive(
    image_size=16,
    dtype="float32",
    vae=dict(kind="pixels", scaling_factor=1.0),
    encoder=part,
    decoder=part,
    tokens=dict(num_registers=9, levels=(8, 5, 5), nested_dropout="uniform"),
    sampler=QUIET,
  )
  rng = np.random.default_rng(0)
  params, _ = meta.unbox(jax.eval_shape(make_stage(config).init, jax.random.key(0)))
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), params)
  return api.FlexTok(params, FrozenConfigDict(config))


@pytest.fixture(scope="module")
def images():
  picture = skimage.data.astronaut()
  return np.stack([picture[y : y + 16, y : y + 16] for y in range(60, 300, 40)])


@pytest.fixture(scope="module")
def noise(model):
  return np.broadcast_to(adaptive.shared_noise(0, model.latent_shape), (6, *model.latent_shape))


@pytest.fixture(scope="module")
def gaps(model, images, noise):
  """Returns {metric: distance of every prefix [b, n]}, using detokenize."""
  ids = model.tokenize(images)
  restored = [model.detokenize(ids, k, noise=noise, **QUIET) for k in range(1, 10)]
  truth = images.astype(np.float32) / 127.5 - 1
  every = [measure(truth, np.clip(x, -1, 1)) for x in restored]
  return {name: np.stack([np.asarray(gap[name]) for gap in every], 1) for name in distances.DISTANCES}


def bisect(row, threshold):
  """A plain bisection over one image's distances."""
  low, high = 1, len(row)
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if row[middle - 1] <= threshold else (middle + 1, high)
  return high


def between(table):
  """Returns a threshold between distances and not close to any, so that rounding has no effect."""
  values = np.sort(table.ravel())
  middle = values[len(values) // 4 : -(len(values) // 4)]
  i = int(np.argmax(np.diff(middle)))
  return float(middle[i] + middle[i + 1]) / 2


@pytest.mark.parametrize("metric", distances.DISTANCES)
def test_tokenize_with_quality(model, images, noise, gaps, metric):
  table = gaps[metric]
  quality = between(table)
  sequences = model.tokenize(images, quality=quality, metric=metric, **QUIET)
  lengths = [len(row) for row in sequences]
  assert lengths == [bisect(row, quality) for row in table] and len(set(lengths)) > 1
  ids = np.asarray(model.tokenize(images))
  for row, all_ids in zip(sequences, ids):
    assert isinstance(row, np.ndarray) and row.dtype == np.int32
    np.testing.assert_array_equal(row, all_ids[: len(row)])
  # detokenize accepts the list; each image meets the quality unless no prefix that was tried does.
  restored = np.clip(model.detokenize(sequences, noise=noise, **QUIET), -1, 1)
  found = np.asarray(measure(images.astype(np.float32) / 127.5 - 1, restored)[metric])
  assert ((found <= quality) | (np.array(lengths) == 9)).all() and (found <= quality).any()
  # A function works as a metric, and explicit noise is used.
  again = model.tokenize(images, quality=quality, metric=distances.DISTANCES[metric], noise=noise, **QUIET)
  assert [row.tolist() for row in again] == [row.tolist() for row in sequences]


def test_tokenize_with_extreme_quality_and_few_tokens(model, images, gaps):
  programs.lengths.clear_cache()
  assert [len(row) for row in model.tokenize(images, quality=1e-9, **QUIET)] == [9] * 6
  assert [len(row) for row in model.tokenize(images, quality=1e9, **QUIET)] == [1] * 6
  quality = between(gaps["mse"])
  given = dict(QUIET, guidance_scale=lambda t: 1.5)
  assert len(set(map(len, model.tokenize(images, quality=quality, **given)))) > 1
  assert programs.lengths._cache_size() == 1  # one compilation for all qualities and scales
  few = model.tokenize(images, num_tokens=5, quality=quality, **QUIET)
  assert [len(row) for row in few] == [bisect(row[:5], quality) for row in gaps["mse"]]
  one = model.tokenize(images.astype(np.float32) / 127.5 - 1, num_tokens=1, quality=quality, **QUIET)
  np.testing.assert_array_equal(np.stack(one), model.tokenize(images, 1))


def test_lengths_for_shards(model, images, gaps):
  """prefix_lengths with the config's sampler equals tokenize; an image's length does not depend on its neighbours."""
  quality = between(gaps["mse"])
  ids = np.asarray(model.tokenize(images))
  lengths_fn = lambda images, ids: api.prefix_lengths(model, images, ids, quality)
  lengths = lengths_fn(images, ids)
  assert lengths.dtype == jnp.int32
  expected = [len(row) for row in model.tokenize(images, quality=quality, **QUIET)]
  np.testing.assert_array_equal(lengths, expected)
  np.testing.assert_array_equal(lengths_fn(images[::-1], ids[::-1]), expected[::-1])
  metrics = image_metrics.make_metrics(["mse"])
  config = with_fields(ConfigDict(model.config), {"eval.batch_size": 4, "seed": 0})
  subject = Subject(config, model.params, metrics, sharding.make_mesh())
  studied, found = halting.make_lengths(subject, "mse")(images, ids, quality)
  np.testing.assert_array_equal(studied, expected)
  np.testing.assert_allclose(found, gaps["mse"][np.arange(6), studied - 1], rtol=1e-4)
  noises = [adaptive.shared_noise(seed, (2, 2, 3)) for seed in (0, 1)]
  assert np.abs(noises[0] - noises[1]).max() > 0.1


BAD = [
  (r"quality=0 must be a finite number above 0", dict(quality=0)),
  (r"quality=-0.1 must", dict(quality=-0.1)),
  (r"quality=nan must", dict(quality=float("nan"))),
  (r"quality=inf must", dict(quality=np.inf)),
  (r"quality='high' must", dict(quality="high")),
  (r"quality=True must", dict(quality=True)),
  (r"unknown metric 'lpips': one of mse, perceptual, or a function", dict(metric="lpips")),
  (r"unknown metric None", dict(metric=None)),
  (r"one floating-point number per image, \[6\] here; got float32 \[\]", dict(metric=lambda a, b: jnp.mean(a - b))),
]


@pytest.mark.parametrize("pattern, given", BAD, ids=range(len(BAD)))
def test_bad_quality_and_metric_are_refused(model, images, pattern, given):
  given = {"quality": 0.1, **given}
  calls = [
    lambda: model.tokenize(images, **given, **QUIET),
    lambda: api.prefix_lengths(model, images, np.zeros((6, 4), np.int32), **given),
  ]
  for call in calls:
    with pytest.raises(ValueError, match=pattern) as error:
      call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_bad_decoding_options_are_refused(model, images, noise):
  refused = lambda pattern: pytest.raises(ValueError, match=pattern)
  with refused("num_steps=0 must"):
    model.tokenize(images, quality=0.1, num_steps=0)
  with refused("unknown guidance 'agp'"):
    model.tokenize(images, quality=0.1, guidance="agp")
  with refused("noise must be 6 latents"):
    model.tokenize(images, quality=0.1, noise=noise[:2], **QUIET)
  with refused(r"decode to images \[6, 8, 8, 3\], which cannot be compared with images \[6, 16, 16, 3\]"):
    model.tokenize(images, quality=0.1, noise=noise[:, :8, :8], **QUIET)
  with refused(r"cannot leave jax.jit"):
    jax.jit(lambda x: model.tokenize(x, quality=0.1, **QUIET))(images)
  with refused(r"seed=-1 must be a whole number from 0 to 4294967295"):
    decoding.decoder_by_image(lambda *_: None, seed=-1)
  vae = dict(vae=dict(kind="autoencoder_kl", block_out_channels=(8, 8), norm_groups=2), stage="vae")
  with refused(r"stage 'vae': it has latents, but no tokens"):
    api.prefix_lengths(api.FlexTok({}, FrozenConfigDict(common.derive(**vae))), images, images, 0.1)
