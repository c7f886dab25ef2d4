"""Rectified flow: times, noise, loss and Euler steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from flextok_jax.ops import flow
from tests.support.numpy_reference import mode_cdf


def normals(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def euler_sample(velocity_fn, noise, num_steps, carry=(), inputs=()):
  """Takes all steps."""
  return flow.euler_steps(velocity_fn, noise, num_steps, flow.step_times(num_steps), carry, inputs)[0]


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
def test_times_follow_their_distribution(mode, scale, cdf):
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
  for batch in (draw, draw[:1], draw[-1:]):  # in a batch of one, a stratified draw covers the whole distribution
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
  sample = jax.jit(lambda noise: euler_sample(lambda x, t, c, _: ((x - x0) / t, c), noise, num_steps))
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
  x = jax.jit(lambda z: euler_sample(velocity_and_check, z, n, (jnp.zeros(n), 0), scales))(noise)
  expected = noise
  for t, scale in zip(1 - np.arange(n) / n, scales):
    expected = expected - scale * (a * expected + b * t) / n
  np.testing.assert_allclose(x, expected, atol=1e-6)
  # More steps approach the differential equation dx/dt = a x + b t, integrated from t = 1 to 0.
  exact = scipy.integrate.solve_ivp(lambda t, x: a * x + b * t, (1, 0), noise[0].astype(float), rtol=1e-9).y[:, -1]
  fine = euler_sample(lambda x, t, c, _: (a * x + b * t, c), jnp.asarray(noise), 2000)
  np.testing.assert_allclose(fine[0], exact, atol=1e-3)
  assert euler_sample(lambda x, t, c, _: (x, c), jnp.ones((1, 2), jnp.bfloat16), 3).dtype == jnp.float32
