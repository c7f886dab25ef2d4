"""Effects of training options on a step of the tokenizer, with a stand-in for its networks; and invalid values.

Tested elsewhere: the distributions of nested dropout and of times, stratified and shifted (tests/ops,
tests/models/test_reference.py, tests/models/test_golden.py); how the loss is divided by kept tokens
(tests/training/test_state.py); that buckets have the loss and gradients of the plain path, also with these options, and
that tokens past keep_k have no effect (tests/models/tokenizer/test_fast.py); unknown modes
(tests/commands/test_bad_input.py); official fields of the same kind (tests/weights/official/test_tokenizer.py).
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

import flextok_jax
from flextok_jax.configs import debug
from flextok_jax.ops import flow, fsq, nested
from flextok_jax.stages import make_stage
from flextok_jax.training.state import TrainState, make_update
from flextok_jax.weights import saving
from tests.support.numpy_reference import mode_cdf
from tests.support.tiny import make_params

N, LEVELS, ROWS = 16, (8, 5, 3), 16
SIZE = 4096


def config_of(**overrides):
  c = debug.get_config()
  c.update(overrides)
  return c


def stage_of(fast=True, **tokens):
  """Returns the same object for the same settings, so it is compiled once."""
  defaults = dict(num_registers=N, levels=LEVELS, nested_dropout="uniform", null_prob=0.25, bucket_rows=ROWS)
  return _stage_of(fast, tuple(sorted((defaults | tokens).items())))


@functools.cache
def _stage_of(fast, tokens):
  return make_stage(config_of(fast=fast, tokens=dict(tokens)))


class StandIn:
  """Replaces the networks: latents [b, N, len(LEVELS)] are the output of the encoder, and inputs are recorded."""

  levels = LEVELS

  def __init__(self, model):
    self.seen, self.latent_shape = [], model.latent_shape
    self.encoder, self.decoder = model.encoder, model.decoder

  def t_shift(self, height, width):
    return 1.0

  def apply(self, _, x, *args, method):
    if method == "modulations":
      return x[:, None]
    if method == "encode_batches":
      return [latents[:, :length] for latents, length in x]
    assert method == "velocity_batches"
    self.seen += [(y.t, y.keep_k, y.drop_condition, y.codes, y.x_t) for y in x]
    return [(y.x_t, None) for y in x]


@functools.partial(jax.jit, static_argnums=0)
def watch(stage, latents, key):
  """Returns the inputs of the decoder: t, keep_k, drop [rows], codes and latents [rows, N, len(LEVELS)].

  Registers that a bucket omits are nan.
  """
  stand_in, groups = StandIn(stage.model), latents.shape[0] // ROWS
  with mock.patch.object(stage, "model", stand_in), mock.patch.object(flow, "add_noise", lambda latents, *_: latents):
    stage.latents_loss({}, latents, key)

  def rows(x):
    x = x.reshape(groups, -1, *x.shape[1:])
    return jnp.pad(x, [(0, 0), (0, 0), (0, N - x.shape[2]), (0, 0)], constant_values=jnp.nan) if x.ndim == 4 else x

  joined = (jnp.concatenate([rows(x) for x in part], 1) for part in zip(*stand_in.seen, strict=True))
  return [x.reshape(-1, *x.shape[2:]) for x in joined]


def latents_of(size=SIZE):
  return np.random.default_rng(0).normal(size=(size, N, len(LEVELS))).astype(np.float32)


def observed(stage, size=SIZE, seed=0):
  """Returns the arrays of watch as numpy, and which tokens are used: bool [rows, N]."""
  found = [np.asarray(x) for x in watch(stage, latents_of(size), jax.random.key(seed))]
  _, keep_k, drop, codes, _ = found
  counted = (np.arange(N) < keep_k[:, None]) & ~drop[:, None]
  assert not np.isnan(codes[counted]).any()
  return *found, counted


def quantize(z):
  """Returns fsq.quantize of z with LEVELS as numpy."""
  return np.asarray(_quantize(z))


_quantize = jax.jit(lambda z: fsq.quantize(z, LEVELS))


def near_share(hits, share):
  """Asserts that the fraction of hits among independent draws is `share`, within five standard deviations."""
  assert abs(np.mean(hits) - share) <= 5 * np.sqrt(share * (1 - share) / np.size(hits))


def test_by_default_the_decoder_gets_quantised_codes():
  *_, codes, z, counted = observed(stage_of())
  np.testing.assert_array_equal(codes[counted], quantize(z)[counted])


def test_disabled_options_compute_nothing():
  """The program is that of the defaults, and nothing is drawn."""
  tokens = dict(num_registers=N, levels=LEVELS)
  off = make_stage(config_of(tokens=tokens | dict(quantization_dropout=0.0, corruption=0.0)))
  programs = [
    str(jax.make_jaxpr(lambda x, stage=stage: watch.__wrapped__(stage, x, jax.random.key(0)))(latents_of(ROWS)))
    for stage in (off, make_stage(config_of(tokens=tokens)))
  ]
  assert programs[0] == programs[1]
  with mock.patch.object(off, "model", StandIn(off.model)):
    rows, _ = off._draw_rows({}, jnp.asarray(latents_of(ROWS)), jax.random.key(0))
  assert rows.unquantized is None and rows.corruption is None


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_corruption_replaces_its_share_of_tokens_by_any_codes(share):
  *_, codes, z, counted = observed(stage_of(corruption=share, quantization_dropout=0.0))

  @jax.jit
  def compute(codes, z):
    ids = fsq.codes_to_ids(codes, LEVELS)
    return fsq.codes_to_ids(fsq.quantize(z, LEVELS), LEVELS), ids, fsq.ids_to_codes(ids, LEVELS)

  clean, ids, known = jax.device_get(compute(codes, z))
  np.testing.assert_array_equal(known[counted], codes[counted])  # codes of the vocabulary
  other, size = (ids != clean) & counted, fsq.num_codes(LEVELS)
  near_share(other[counted], share * (1 - 1 / size))  # now and then the code drawn is the one that was there
  assert scipy.stats.chisquare(np.bincount(ids[other], minlength=size)).pvalue > 1e-4 or share < 1
  for i in range(N):  # every register, and independently of its neighbour
    near_share(other[:, i][counted[:, i]], share * (1 - 1 / size))
  both = counted[:, 1:]
  near_share((other[:, 1:] & other[:, :-1])[both], (share * (1 - 1 / size)) ** 2)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_quantisation_dropout_skips_whole_samples(share):
  *_, drop, codes, z, counted = observed(stage_of(quantization_dropout=share))
  rounded = quantize(z)
  bounded = np.asarray(fsq.bound(z, LEVELS)) / [level // 2 for level in LEVELS]
  skipped = np.isclose(codes, bounded, atol=1e-6).all(2)
  assert (skipped | (codes == rounded).all(2))[counted].all()
  some = [counted[i].any() for i in range(len(counted))]
  whole = np.array([skipped[i][counted[i]].all() for i in range(len(counted))])
  partly = np.array([skipped[i][counted[i]].any() for i in range(len(counted))])
  np.testing.assert_array_equal(whole[some], partly[some])
  near_share(whole[some], share)


def test_both_options_are_independent_of_the_bucketing():
  """A bucket gets the same inputs as its rows on the plain path, for any number of rows per group."""
  options = dict(quantization_dropout=0.5, corruption=0.3)
  fast, plain = (observed(stage_of(fast, **options), 256) for fast in (True, False))
  counted = fast[-1]
  for a, b in zip(fast[:3], plain[:3]):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(fast[3][counted], plain[3][counted], atol=1e-6)
  assert np.isnan(fast[3]).any() and not np.isnan(plain[3]).any()  # which ran all registers
  assert (np.abs(fast[3] - observed(stage_of(True, **options), 256, seed=1)[3]) > 1e-3)[counted].mean() > 0.5


def test_gradients_pass_where_nothing_is_rounded_and_stop_where_a_code_was_replaced():
  z = latents_of(8)
  weights = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)
  skip, ids = np.arange(8) < 4, np.full((8, N), -1)
  ids[:, ::3] = 7

  def loss(z):
    codes = fsq.quantize(z, LEVELS, skip[:, None])
    return (fsq.corrupt(codes, ids, LEVELS) * weights).sum()

  grad = np.asarray(jax.jit(jax.grad(loss))(z))
  straight = np.asarray(jax.jit(jax.grad(lambda z: (fsq.quantize(z, LEVELS) * weights).sum()))(z))
  np.testing.assert_array_equal(grad, np.where(ids[..., None] < 0, straight, 0))
  assert (straight != 0).all()


def test_skipping_all_quantisation_trains_on_bounded_codes():
  """The real networks: loss and gradients of quantization_dropout=1 are those of codes that are never rounded."""
  one = dict(tokens=dict(num_registers=4, quantization_dropout=1.0))
  stages = make_stage(config_of(**one)), make_stage(config_of())
  params = make_params(stages[0])
  latents = np.random.default_rng(1).normal(size=(8, 16, 16, 3)).astype(np.float32)
  loss_of = lambda stage: lambda p: stage.latents_loss(p, latents, jax.random.key(2))[0]
  grad_of = lambda stage: jax.jit(jax.value_and_grad(loss_of(stage)))
  loss, grads = grad_of(stages[0])(params)

  def bounded(z, levels, _):
    return fsq.bound(z, levels) / jnp.asarray([level // 2 for level in levels])

  rounded_loss = jax.jit(loss_of(stages[1]))(params)
  with mock.patch.object(fsq, "quantize", bounded):
    expected_loss, expected = grad_of(stages[1])(params)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  assert abs(rounded_loss - loss) > 1e-5 * loss
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), grads, expected)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads["encoder"]))


def test_options_do_not_affect_inference():
  quick = dict(num_steps=1, guidance="none")
  plain, disturbed = (
    make_stage(config_of(tokens=dict(num_registers=4) | more, sampler=quick))
    for more in ({}, dict(quantization_dropout=1.0, corruption=1.0, null_prob=1.0, nested_dropout="none"))
  )
  params = make_params(plain)
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  ids, other = (np.asarray(jax.jit(stage.predict_fns["tokenize"])(params, images)) for stage in (plain, disturbed))
  np.testing.assert_array_equal(ids, other)
  keys = jax.random.split(jax.random.key(1), 2)
  decode = lambda stage: jax.jit(stage.predict_fns["detokenize"])(params, ids, np.array([2, 4]), keys)
  np.testing.assert_array_equal(decode(plain), decode(disturbed))


# Condition dropout, nested dropout and times, as they arrive.


@pytest.mark.parametrize("null_prob", [0.0, 0.25, 0.3, 1.0])
def test_the_unconditional_fraction_is_stratified(null_prob):
  _, _, drop, *_ = observed(stage_of(null_prob=null_prob))
  by_group = drop.reshape(-1, ROWS).sum(1)
  expected = ROWS * null_prob
  assert set(by_group) <= {np.floor(expected), np.ceil(expected)}
  assert abs(drop.mean() - null_prob) < 5 * np.sqrt(0.25 / len(by_group)) / ROWS + 1e-9


def test_dropped_conditions_and_kept_lengths_are_random_per_image():
  """Over many steps all images of the batch have the same distribution, regardless of their position."""
  stage, latents = stage_of(), latents_of(2 * ROWS)
  steps = 2000
  _, keep_k, drop, _, z = jax.vmap(lambda key: watch(stage, latents, key))(jax.random.split(jax.random.key(0), steps))
  image = np.argmax((np.asarray(z)[:, :, None, 0] == latents[None, None, :, 0]).all(-1), -1)  # [steps, rows]
  for value, mean, deviation in ((drop, 0.25, np.sqrt(0.25 * 0.75)), (np.where(drop, 8.5, keep_k), 8.5, 4.0)):
    totals = np.zeros(2 * ROWS)
    np.add.at(totals, image.ravel(), np.asarray(value, np.float64).ravel())
    assert (np.abs(totals / steps - mean) < 5 * deviation / np.sqrt(steps)).all()


@pytest.mark.parametrize("mode", nested.MODES)
def test_kept_lengths_of_a_step_follow_the_distribution_of_the_mode(mode):
  """Stratified over 16 conditional rows: each length occurs as often as expected, up to one per group."""
  _, keep_k, *_ = observed(stage_of(nested_dropout=mode, null_prob=0.0))
  counts = np.bincount(keep_k, minlength=N + 1)[1:] / SIZE
  np.testing.assert_allclose(counts, nested.length_distribution(mode, N), atol=5 * np.sqrt(0.25 / (SIZE / ROWS)) / ROWS)
  assert mode != "none" or (keep_k == N).all()


@pytest.mark.parametrize(
  "mode, cdf",
  [
    ("uniform", lambda x: x),
    ("mode", mode_cdf(0.25)),
    ("logit_normal", lambda x: scipy.stats.norm.cdf(scipy.special.logit(x))),
    ("stratified_logit_normal", lambda x: scipy.stats.norm.cdf(scipy.special.logit(x))),
  ],
)
@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_times_of_a_step_follow_the_distribution_of_the_config(mode, cdf, shift):
  tokens = dict(num_registers=N, levels=LEVELS, bucket_rows=ROWS)
  stage = make_stage(config_of(tokens=tokens, flow=dict(t_sampling=mode, t_shift=shift)))
  t, keep_k, *_ = observed(stage)
  unshifted = lambda x: x / (shift - (shift - 1) * x)
  assert scipy.stats.kstest(t.astype(np.float64), lambda x: cdf(unshifted(x))).pvalue > 1e-3
  assert abs(scipy.stats.spearmanr(t, keep_k).statistic) < 0.08  # times and lengths are independent


@pytest.mark.parametrize(
  "words, fields",
  [
    ("tokens.quantization_dropout must be .* from 0 to 1, got 1.5", dict(tokens=dict(quantization_dropout=1.5))),
    ("tokens.corruption must be .* from 0 to 1, got -0.1", dict(tokens=dict(corruption=-0.1))),
    ("tokens.corruption must be .* from 0 to 1, got nan", dict(tokens=dict(corruption=float("nan")))),
    ("tokens.null_prob must be .* from 0 to 1, got 2.0", dict(tokens=dict(null_prob=2.0))),
    ("flow.t_shift must be a finite number above 0, got 0.0", dict(flow=dict(t_shift=0.0))),
    ("flow.t_shift must be a finite number above 0, got nan", dict(flow=dict(t_shift=float("nan")))),
  ],
)
def test_fractions_out_of_range_are_one_line_errors(words, fields):
  with pytest.raises(ValueError, match=words) as error:
    make_stage(config_of(**fields))
  assert "\n" not in str(error.value)


# Register counts and levels.


@pytest.mark.parametrize(
  "registers, levels, mode", [(1, (2,), "none"), (5, (7, 2, 3), "uniform"), (11, (3, 3), "uniform_pow2")]
)
def test_any_count_and_levels_train_load_and_decode(registers, levels, mode, tmp_path):
  config = config_of(
    tokens=dict(num_registers=registers, levels=levels, nested_dropout=mode, quantization_dropout=0.3, corruption=0.2),
    train=dict(export_dtype="float32"),
    sampler=dict(num_steps=1, guidance="none"),
  )
  stage, optimizer = make_stage(config), optax.sgd(0.1)
  start = make_params(stage)  # heads are initialised with zeros, which would hide the gradients of other parts
  state = TrainState(np.int32(0), start, {}, start, optimizer.init(start))
  update = jax.jit(make_update(stage, optimizer, accumulate_steps=1, decay=0.9))
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
  for _ in range(2):
    state, metrics = update(state, {"image": images, "unreadable": np.zeros(8, np.int32)}, jax.random.key(1))
  assert np.isfinite(float(metrics["loss"].compute()))
  state = jax.device_get(state)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, state.params)
  unmoved = {path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(moved) if not x}
  assert unmoved == ({"mask_token"} if mode == "none" else set())  # if all registers are kept, it is unused

  path = tmp_path / "weights.safetensors"
  saving.save_weights(str(path), config, state.joined(), "float32")
  model = flextok_jax.load(str(path))
  ids = model.tokenize(images)
  assert ids.shape == (8, registers) and ids.min() >= 0 and ids.max() < np.prod(levels)
  np.testing.assert_array_equal(ids, jax.jit(stage.predict_fns["tokenize"])(state.joined(), images))
  for count in {1, (registers + 1) // 2, registers}:
    decoded = model.detokenize(ids[:, :count], key=jax.random.key(0))
    assert decoded.shape == (8, 16, 16, 3) and np.isfinite(decoded).all()
