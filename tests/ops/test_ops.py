"""Properties of the maths without parameters; its numbers stand in test_golden.py and test_reference.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from flextok_jax.ops import flow, fsq, guidance, nested, posemb

LEVELS = (8, 8, 8, 5, 5, 5)


def normals(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# FSQ.


def test_every_id_survives_the_round_trip():
  ids = jnp.arange(fsq.num_codes(LEVELS), dtype=jnp.int32)
  assert ids.size == 64_000
  codes = jax.jit(lambda x: fsq.ids_to_codes(x, LEVELS))(ids)
  assert codes.dtype == jnp.float32 and codes.min() == -1 and codes.max() == 1
  assert len(np.unique(codes, axis=0)) == 64_000
  again = jax.jit(lambda x: fsq.codes_to_ids(x, LEVELS))(codes)
  assert again.dtype == jnp.int32
  np.testing.assert_array_equal(again, ids)


@pytest.mark.parametrize("levels", [LEVELS, (8, 6, 5), (7, 5, 5, 5, 5), (2, 3, 4)])
def test_quantising_reaches_every_code_and_nothing_else(levels):
  """An even level n lies on -n/2..n/2-1 and an odd one on -(n-1)/2..(n-1)/2, both divided by n // 2."""
  points = [(np.arange(level) - level // 2) / (level // 2) for level in levels]
  grid = np.stack(np.meshgrid(*points, indexing="ij"), -1).reshape(-1, len(levels))
  # bound() is monotonic in each channel: on a fine line each channel takes each of its values, once, in rising order.
  line = np.linspace(-8, 8, 4001, dtype=np.float32)
  codes = np.asarray(fsq.quantize(np.tile(line[:, None], len(levels)), levels))
  preimages = []
  for channel, expected in enumerate(points):
    assert (np.diff(codes[:, channel]) >= 0).all()
    np.testing.assert_array_equal(np.unique(codes[:, channel]), expected.astype(np.float32))
    middles = [line[codes[:, channel] == np.float32(value)] for value in expected]
    preimages.append([middle[len(middle) // 2] for middle in middles])
  z = np.stack(np.meshgrid(*preimages, indexing="ij"), -1).reshape(-1, len(levels))
  quantised = fsq.quantize(z, levels)
  np.testing.assert_array_equal(quantised, grid.astype(np.float32))
  ids = np.asarray(fsq.codes_to_ids(quantised, levels))
  assert sorted(ids.tolist()) == list(range(fsq.num_codes(levels)))
  np.testing.assert_array_equal(fsq.ids_to_codes(ids, levels), quantised)


def test_quantising_extremes_and_half_precision():
  z = jnp.array([[-jnp.inf] * 6, [jnp.inf] * 6, [-1e30] * 6, [1e30] * 6])
  codes = fsq.quantize(z, LEVELS)
  assert (codes[0] == -1).all() and (codes[2] == -1).all()
  np.testing.assert_array_equal(codes[1], np.float32([0.75, 0.75, 0.75, 1, 1, 1]))
  np.testing.assert_array_equal(codes[3], codes[1])
  z = jnp.asarray(normals(100, 6), jnp.bfloat16)
  np.testing.assert_array_equal(fsq.quantize(z, LEVELS), fsq.quantize(z.astype(jnp.float32), LEVELS))


def test_gradient_is_straight_through():
  """The gradient of quantize is that of the bound alone, divided by the half width; rounding itself has none."""
  z, weights = 2 * normals(200, 6), normals(200, 6, seed=1)
  half = np.array([4, 4, 4, 2, 2, 2])
  grad = jax.grad(lambda z: (fsq.quantize(z, LEVELS) * weights).sum())(z)
  bound = jax.grad(lambda z: (fsq.bound(z, LEVELS) / half * weights).sum())(z)
  np.testing.assert_allclose(grad, bound, rtol=1e-6)
  assert (np.abs(grad) > 0).all()
  rounding = jax.grad(lambda z: (jnp.round(fsq.bound(z, LEVELS)) * weights).sum())(z)
  assert (rounding == 0).all()


def test_saturation_is_the_part_beyond_one():
  z = np.zeros((3, 2, 6), np.float32)
  z[1], z[2, 0, 0] = np.linspace(-1, 1, 6), -3
  np.testing.assert_allclose(fsq.saturation(z, jnp.array([2, 2, 2])), [0, 0, 4 / 12], rtol=1e-6)
  np.testing.assert_allclose(fsq.saturation(z, jnp.array([1, 1, 1])), [0, 0, 4 / 6], rtol=1e-6)  # of the kept alone
  np.testing.assert_array_equal(fsq.saturation(z[:, ::-1], jnp.array([1, 1, 1])), [0, 0, 0])


# Nested dropout (its distributions: test_reference.py).


@pytest.mark.parametrize("num, expected", [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (16, (1, 2, 4, 8, 16))])
def test_lengths(num, expected):
  assert nested.powers_of_two(num) == expected


@pytest.mark.parametrize("mode", nested.MODES)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_kept_lengths_are_stratified(mode, rows):
  """A row drawn at random has the mode's law; in a group every length comes floor or ceil of its expected times."""
  n, null_prob, groups = 16, 0.2, 60_000 // rows
  keep_k, drop = (np.asarray(x) for x in nested.sample_keep_k(jax.random.key(1), groups, rows, n, mode, null_prob))
  assert keep_k.shape == drop.shape == (groups, rows) and keep_k.dtype == np.int32
  values = np.where(drop, 0, keep_k)
  law = np.concatenate([[null_prob], (1 - null_prob) * nested.length_distribution(mode, n)])
  error = np.sqrt(law * (1 - law) / groups)  # no larger than that of independent draws
  assert (np.abs(np.bincount(values.ravel(), minlength=n + 1) / values.size - law) <= 5 * error + 1e-6).all()
  counts = (values[:, :, None] == np.arange(n + 1)).sum(1)
  expected = rows * law
  assert (counts >= np.floor(expected - 1e-6)).all() and (counts <= np.ceil(expected + 1e-6)).all()
  bounds = nested.row_bounds(mode, n, null_prob, rows)
  assert (values <= bounds).all() and (values.max(0) == bounds).all()  # reached, too


def test_every_row_may_be_null_or_none():
  keep_k, drop = nested.sample_keep_k(jax.random.key(0), 3, 4, 8, "pow2", 1.0)
  assert drop.all() and (keep_k >= 1).all() and (nested.row_bounds("pow2", 8, 1.0, 4) == 0).all()
  assert not nested.sample_keep_k(jax.random.key(0), 3, 4, 8, "pow2", 0.0)[1].any()


@pytest.mark.parametrize("num", [1, 2, 5, 8, 9, 16, 100, 256])
def test_slots(num):
  """Few sizes; room for every kept register and, where any is masked, for a masked one."""
  sizes = nested.padded_lengths(num)
  assert sizes[-1] == num and list(sizes) == sorted(set(sizes)) and len(sizes) <= 2 + num.bit_length()
  for k in range(1, num + 1):
    slots = nested.padded_length(k, num)
    assert slots in sizes and (slots > k or slots == k == num)
    assert slots == min(size for size in sizes if size > k or size == num)


def test_weights_of_slots_add_up_to_all_registers():
  keep_k, drop = jnp.array([1, 5, 7, 16, 3]), jnp.array([False, False, False, False, True])
  for slots in (8, 12, 16):
    weights = np.exp(nested.key_log_counts(jnp.minimum(keep_k, slots), drop, slots, 16))
    rows = [0, 1, 2, 4] + [3] * (slots == 16)  # all 16 kept need 16 slots
    np.testing.assert_allclose(weights.sum(1)[rows], 16, rtol=1e-6)
    np.testing.assert_allclose(weights[1, :5], 1)
    np.testing.assert_allclose(np.exp(nested.key_log_counts(keep_k, drop, slots, 16, True))[4].sum(), 1, rtol=1e-6)
  np.testing.assert_array_equal(nested.key_log_counts(keep_k, drop, 16, 16), 0)  # nothing is merged


def test_unknown_nested_dropout():
  with pytest.raises(ValueError, match="'pow3'.*uniform, pow2, uniform_pow2"):
    nested.length_distribution("pow3", 4)


def test_no_gradient_reaches_masked_positions():
  keep_k = jnp.array([0, 2, 5])
  grad = jax.grad(lambda x: jnp.square(nested.mask_tail(x, jnp.ones(4), keep_k)).sum())(jnp.asarray(normals(3, 5, 4)))
  kept = np.arange(5) < np.array([0, 2, 5])[:, None]
  np.testing.assert_array_equal((grad != 0).any(-1), kept)
  # The fill receives the gradient of every position that it stands in.
  fill_grad = jax.grad(lambda f: nested.mask_tail(jnp.zeros((3, 5, 4)), f, keep_k).sum())(jnp.ones(4))
  np.testing.assert_array_equal(fill_grad, [(~kept).sum()] * 4)


# Rectified flow.


def mode_cdf(scale):
  """P(t <= x) of mode sampling, by inverting its falling map of u on a fine grid."""
  u = np.linspace(0, 1, 100_001)
  t = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
  assert (np.diff(t) < 0).all()
  return lambda x: 1 - np.interp(x, t[::-1], u[::-1])


@pytest.mark.parametrize(
  "mode, scale, cdf",
  [
    ("uniform", 0.0, lambda x: x),
    ("logit_normal", 0.0, lambda x: scipy.stats.norm.cdf(scipy.special.logit(x))),
    ("stratified_logit_normal", 0.0, lambda x: scipy.stats.norm.cdf(scipy.special.logit(x))),
    ("mode", 0.25, mode_cdf(0.25)),
    ("mode", 1.29, mode_cdf(1.29)),
    ("mode", -0.5, mode_cdf(-0.5)),
  ],
)
def test_times_follow_their_law(mode, scale, cdf):
  t = np.asarray(flow.sample_t(jax.random.key(0), 20_000, mode, scale))
  assert t.dtype == np.float32 and t.min() >= 0 and t.max() <= 1
  result = scipy.stats.kstest(t.astype(np.float64), cdf)
  assert result.pvalue > 1e-3
  if mode.startswith("stratified"):  # sample i in its own quantile: within 1/n of the law everywhere
    assert result.statistic < 1.1 / t.size
    assert (np.diff(t) >= 0).all()


@pytest.mark.parametrize("mode", flow.T_SAMPLINGS)
def test_times_of_extreme_draws_stay_in_the_unit_interval(mode):
  if mode == "logit_normal":
    draw = [-np.inf, -200, 0, 200, np.inf]
  else:
    draw = [0, 1e-45, 0.5, np.nextafter(np.float32(1), np.float32(0)), np.nextafter(np.float32(1), np.float32(0))]
  draw = np.float32(draw)
  for batch in (draw, draw[:1], draw[-1:]):  # alone, a stratified draw spans the whole law
    t = np.asarray(flow.t_from_draw(jnp.asarray(batch), mode, 1.29))
    assert np.isfinite(t).all() and (t >= 0).all() and (t <= 1).all(), t
  t = np.asarray(flow.t_from_draw(jnp.asarray(draw), mode, 1.29))
  ends = (1, 0) if mode == "mode" else (0, 1)
  np.testing.assert_allclose(t[[0, -1]], ends, atol=0.02 if mode == "stratified_logit_normal" else 1e-6)


def test_shifted_times():
  """The ends stay, order stays, and the odds t / (1 - t) are multiplied by the shift."""
  t = np.linspace(0, 1, 101, dtype=np.float32)
  for shift in (0.5, 1.0, 3.0):
    moved = np.asarray(flow.shift_t(t, shift), np.float64)
    assert moved[0] == 0 and moved[-1] == 1 and (np.diff(moved) > 0).all()
    np.testing.assert_allclose(moved[1:-1] / (1 - moved[1:-1]), shift * t[1:-1] / (1 - t[1:-1]), rtol=1e-4)
  drawn = [flow.sample_t(jax.random.key(0), 50, "uniform", 0.0, shift) for shift in (1.0, 3.0)]
  np.testing.assert_allclose(drawn[1], flow.shift_t(drawn[0], 3.0), rtol=1e-6)


def test_unknown_t_sampling():
  with pytest.raises(ValueError, match="'lognormal'.*logit_normal"):
    flow.sample_t(jax.random.key(0), 4, "lognormal", 0.0)


def test_noising_ends_and_loss_of_the_exact_velocity():
  x0, noise = normals(3, 4, 5, 2), normals(3, 4, 5, 2, seed=1)
  np.testing.assert_array_equal(flow.add_noise(x0, noise, jnp.zeros(3)), x0)
  np.testing.assert_array_equal(flow.add_noise(x0, noise, jnp.ones(3)), noise)
  np.testing.assert_array_equal(flow.flow_loss(noise - x0, x0, noise), np.zeros(3))
  loss = flow.flow_loss(jnp.asarray(normals(3, 4, 5, 2, seed=2), jnp.bfloat16), x0, noise)
  assert loss.shape == (3,) and loss.dtype == jnp.float32


@pytest.mark.parametrize("num_steps", [1, 3, 25])
def test_euler_is_exact_on_straight_lines(num_steps):
  """The flow to a single picture is v = (x - x0) / t: its paths are straight, so any number of steps ends at x0."""
  x0, noise = normals(2, 4, 4, 3), normals(2, 4, 4, 3, seed=1)
  sample = jax.jit(lambda noise: flow.euler_sample(lambda x, t, c, _: ((x - x0) / t, c), noise, num_steps))
  np.testing.assert_allclose(sample(noise), x0, atol=1e-5)


def test_euler_times_carry_and_linear_field():
  """Steps at t = 1, 1 - 1/N, ..., 1/N; under v = a x + b t the state is that of the recursion, carried in order."""
  n, a, b = 7, 0.8, -0.3

  def velocity(x, t, seen):
    times, i = seen
    return a * x + b * t, (times.at[i].set(t), i + 1)

  def velocity_and_check(x, t, seen, scale):
    v, (times, i) = velocity(x, t, seen)
    return scale * (v + times[0] - 1), (times, i)  # the first time, 1, is still in the carry at every later step

  noise, scales = normals(3, 5), np.linspace(0.5, 1.5, n)
  x = jax.jit(lambda z: flow.euler_sample(velocity_and_check, z, n, (jnp.zeros(n), 0), scales))(noise)
  expected = noise
  for t, scale in zip(1 - np.arange(n) / n, scales):
    expected = expected - scale * (a * expected + b * t) / n
  np.testing.assert_allclose(x, expected, atol=1e-6)
  # More steps approach the differential equation dx/dt = a x + b t, integrated from t = 1 to 0.
  exact = scipy.integrate.solve_ivp(lambda t, x: a * x + b * t, (1, 0), noise[0].astype(float), rtol=1e-9).y[:, -1]
  fine = flow.euler_sample(lambda x, t, c, _: (a * x + b * t, c), jnp.asarray(noise), 2000)
  np.testing.assert_allclose(fine[0], exact, atol=1e-3)
  assert flow.euler_sample(lambda x, t, c, _: (x, c), jnp.ones((1, 2), jnp.bfloat16), 3).dtype == jnp.float32


# Guidance.


@pytest.fixture(name="v")
def velocities():
  return normals(4, 6, 5, 3), normals(4, 6, 5, 3, seed=1)


def dots(a, b):
  """Scalar products of samples, in float64."""
  return (np.float64(a) * np.float64(b)).reshape(len(a), -1).sum(1)


def test_scale_one_is_the_conditional_velocity(v):
  v_c, v_u = v
  np.testing.assert_allclose(guidance.cfg(v_c, v_u, 1.0), v_c, atol=1e-6)
  np.testing.assert_array_equal(guidance.apg(v_c, v_u, 1.0, jnp.zeros_like(v_c))[0], v_c)
  np.testing.assert_array_equal(guidance.cfg(v_c, v_u, 0.0), v_u)
  # Equal velocities: nothing to guide along.
  np.testing.assert_allclose(guidance.apg(v_c, v_c, 9.0, jnp.zeros_like(v_c))[0], v_c, atol=1e-6)


def test_apg_with_everything_off_is_cfg(v):
  v_c, v_u = v
  running = jnp.zeros_like(v_c)
  for _ in range(3):  # without momentum the running sum forgets
    out, running = guidance.apg(v_c, v_u, 4.0, running, momentum=0.0, eta=1.0, threshold=0.0)
    np.testing.assert_allclose(out, guidance.cfg(v_c, v_u, 4.0), atol=1e-5)


def test_apg_moves_across_the_conditional_velocity_by_a_bounded_length(v):
  v_c, v_u = v
  out, running = guidance.apg(v_c, v_u, 7.5, jnp.zeros_like(v_c), eta=0.0, threshold=2.5)
  moved = np.float64(out) - v_c
  lengths = np.sqrt(dots(moved, moved))
  assert (np.abs(dots(moved, v_c)) < 1e-5 * lengths * np.sqrt(dots(v_c, v_c))).all()
  # At most threshold * (scale - 1); the direction is longer than the threshold, so what is left is its projection.
  difference = np.float64(v_c) - v_u
  assert (np.sqrt(dots(difference, difference)) > 2.5).all()
  cosine = dots(difference, v_c) / np.sqrt(dots(difference, difference) * dots(v_c, v_c))
  np.testing.assert_allclose(lengths, 2.5 * 6.5 * np.sqrt(1 - cosine**2), rtol=1e-4)
  np.testing.assert_allclose(running, difference, atol=1e-6)  # unclipped
  # With eta = 1 the parallel part stays, and the length is the threshold itself.
  out, _ = guidance.apg(v_c, v_u, 7.5, jnp.zeros_like(v_c), eta=1.0, threshold=2.5)
  moved = np.float64(out) - v_c
  np.testing.assert_allclose(np.sqrt(dots(moved, moved)), 2.5 * 6.5, rtol=1e-4)


def test_apg_momentum_adds_up(v):
  v_c, v_u = v
  running = jnp.zeros_like(v_c)
  for _ in range(3):
    _, running = guidance.apg(v_c, v_u, 2.0, running, momentum=-0.5)
  np.testing.assert_allclose(running, (1 - 0.5 + 0.25) * (v_c - v_u), atol=1e-5)


def test_apg_treats_samples_apart_and_survives_zeros(v):
  v_c, v_u = v
  out, running = guidance.apg(v_c, v_u, 7.5, jnp.zeros_like(v_c))
  other_c, other_u = v_c.copy(), v_u.copy()
  other_c[1:], other_u[1:] = 100, -7
  again, _ = guidance.apg(other_c, other_u, 7.5, jnp.zeros_like(v_c))
  np.testing.assert_array_equal(out[0], again[0])
  zeros = jnp.zeros_like(v_c)
  for pair in ((zeros, zeros), (zeros, v_u), (v_c, zeros)):
    assert all(np.isfinite(x).all() for x in guidance.apg(*pair, 7.5, zeros))


# Positions and times.


def test_positions_tell_every_place_apart():
  table = np.asarray(posemb.sincos_2d(16, 16, 32)).reshape(256, 32)
  distances = np.linalg.norm(table[:, None] - table[None], axis=-1)
  assert distances[~np.eye(256, dtype=bool)].min() > 0.5
  np.testing.assert_array_equal(posemb.sincos_2d(4, 4, 8)[0, 0], [0, 0, 1, 1, 0, 0, 1, 1])
  np.testing.assert_array_equal(posemb.sincos_2d(5, 3, 16), posemb.sincos_2d(9, 7, 16)[:5, :3])
  with pytest.raises(ValueError, match="multiple of 4, got 6"):
    posemb.sincos_2d(2, 2, 6)


def test_time_features():
  t = np.linspace(0, 1, 300, dtype=np.float32)
  features = np.asarray(posemb.timestep_features(t, 64), np.float64)
  cos, sin = features[:, :32], features[:, 32:]
  np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
  np.testing.assert_array_equal(features[0], [1] * 32 + [0] * 32)
  # From 1000 radians a unit of time down to 1000 / 256 almost, in equal ratios.
  slopes = np.asarray(posemb.timestep_features(jnp.array([1e-5]), 64), np.float64)[0, 32:] / 1e-5
  np.testing.assert_allclose(slopes, 1000 * 256 ** (-np.arange(32) / 32), rtol=1e-4)
  assert posemb.timestep_features(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
