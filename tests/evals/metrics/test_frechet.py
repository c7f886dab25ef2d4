"""Moments and Fréchet distances against closed forms and other implementations; statistics and image files."""

import itertools
import pickle
import zipfile

import jax
import numpy as np
import pytest
import scipy.linalg

from flextok_jax.evals.metrics import frechet
from flextok_jax.evals.metrics.frechet import Moments, SampleFile, load_statistics, save_statistics


def make_features(n=60, dim=12, seed=0):
  """Returns correlated float32 features with a mean far from zero and standard deviations from 1 to 1e-3."""
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(n, dim)) * np.logspace(0, -3, dim) @ scipy.linalg.qr(rng.normal(size=(dim, dim)))[0]
  return (mixed + 7).astype(np.float32)


def moments_of(features):
  moments = Moments(features.shape[1])
  moments.add(features)
  return moments


def gaussian(features):
  return features.mean(0, dtype=np.float64), np.cov(features.astype(np.float64), rowvar=False)


def test_moments_are_independent_of_order_and_partition():
  features = make_features()
  mean, covariance = gaussian(features)
  parts = np.split(features, [1, 1, 20, 35])  # one part has a single row, one is empty
  for order in itertools.permutations(range(5)):
    streamed, merged = Moments(12), Moments(12)
    for i in order:
      streamed.add(parts[i])
      merged.merge(moments_of(parts[i]))
    for moments in (streamed, merged):
      assert moments.count == 60
      np.testing.assert_allclose(moments.mean, mean, rtol=1e-14)
      np.testing.assert_allclose(moments.covariance(), covariance, atol=1e-14)


def test_moments_far_from_zero_do_not_cancel():
  features = make_features().astype(np.float64) + 1e6
  moments = Moments(12)
  for row in features:
    moments.add(row[None])
  np.testing.assert_allclose(moments.covariance(), gaussian(features)[1], atol=1e-9)
  naive = features.T @ features / 60 - np.outer(features.mean(0), features.mean(0))
  assert np.abs(naive - moments.covariance()).max() > 1e-5


def test_padding_rows_are_ignored():
  features = make_features()
  valid = np.arange(60) % 3 > 0
  expected = moments_of(features[valid])
  features[~valid] = np.nan
  moments = Moments(12)
  moments.add(features, valid)
  assert moments.count == 40
  np.testing.assert_array_equal(moments.scatter, expected.scatter)
  moments.add(features, np.zeros(60))
  assert moments.count == 40


def test_moments_of_sharded_batches():
  features = make_features(64)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  network = jax.jit(lambda x: x + 1, out_shardings=jax.NamedSharding(mesh, jax.P()))
  moments = Moments(12)
  for rows in np.split(np.arange(64), 4):
    moments.add(network(jax.device_put(features[rows], jax.NamedSharding(mesh, jax.P("data")))), rows < 50)
  expected = moments_of(features[:50] + 1)
  np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-14)
  np.testing.assert_allclose(moments.covariance(), expected.covariance(), atol=1e-14)


def test_accumulation_continues_from_saved_state():
  features = make_features()
  first = moments_of(features[:25])
  second = Moments.from_arrays(first.to_arrays())
  kept = first.scatter.copy()
  second.add(features[25:])
  first_again = moments_of(features[:25])
  first_again.add(features[25:])
  np.testing.assert_array_equal(second.scatter, first_again.scatter)
  np.testing.assert_array_equal(second.mean, first_again.mean)
  np.testing.assert_array_equal(first.scatter, kept)  # the state is a copy


def test_moments_reject_bad_input():
  moments = Moments(3)
  with pytest.raises(ValueError, match=r"\[4, 2\], not \[n, 3\]"):
    moments.add(np.zeros((4, 2)))
  with pytest.raises(ValueError, match="not finite"):
    moments.add(np.full((4, 3), np.inf))
  with pytest.raises(ValueError, match="got 0"):
    moments.covariance()
  with pytest.raises(ValueError, match="2 features cannot be merged with those of 3"):
    moments.merge(Moments(2))


def test_distance_of_commuting_gaussians_matches_the_closed_form():
  rng = np.random.default_rng(1)
  basis = scipy.linalg.qr(rng.normal(size=(9, 9)))[0]
  s, t = rng.uniform(0, 3, (2, 9))
  s[:2] = t[1:3] = 0  # both are singular
  mu, nu = rng.normal(size=(2, 9))
  expected = np.square(mu - nu).sum() + np.square(s - t).sum()
  ours = frechet.frechet_distance(mu, basis * s**2 @ basis.T, nu, basis * t**2 @ basis.T)
  np.testing.assert_allclose(ours, expected, rtol=1e-7)


def test_distance_of_two_by_two_matrices_matches_the_closed_form():
  """tr (S T)^(1/2) = sqrt(tr S T + 2 sqrt(det S T)), for matrices that do not commute."""
  s, t = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
  product = s @ t
  root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
  assert np.abs(product - product.T).max() > 0.1
  ours = frechet.frechet_distance([1.0, 2.0], s, [1.5, 0.0], t)
  np.testing.assert_allclose(ours, 4.25 + 7 - 2 * root, rtol=1e-13)


@pytest.mark.parametrize("n", [300, 20])  # of 32 features: of full rank, and not
def test_distance_matches_other_formulas(n):
  """Those of pytorch_fid (scipy's sqrtm), torch_fidelity (eigenvalues of the product), and the nuclear norm."""
  a, b = make_features(n, 32, 1).astype(np.float64), 1.3 * make_features(n, 32, 2).astype(np.float64)
  (mu, sigma), (nu, tau) = gaussian(a), gaussian(b)
  ours = frechet.frechet_distance(mu, sigma, nu, tau)
  rest = np.square(mu - nu).sum() + np.trace(sigma) + np.trace(tau)
  overlap = scipy.linalg.svdvals((a - mu) @ (b - nu).T).sum() / (n - 1)
  eigenvalues = scipy.linalg.eigvals(sigma @ tau).astype(complex)
  np.testing.assert_allclose(ours, rest - 2 * overlap, rtol=1e-7)
  np.testing.assert_allclose(ours, rest - 2 * np.sqrt(eigenvalues).real.sum(), rtol=1e-6)
  if n == 300:
    root = scipy.linalg.sqrtm(sigma @ tau)
    np.testing.assert_allclose(ours, rest - 2 * np.trace(root).real, rtol=1e-6)
  np.testing.assert_allclose(ours, frechet.frechet_distance(nu, tau, mu, sigma), rtol=1e-7)
  assert frechet.frechet_distance(mu, sigma, mu, sigma) < 1e-7


def test_distance_rejects_bad_input():
  eye = np.eye(3)
  with pytest.raises(ValueError, match="3 and of 2 features"):
    frechet.frechet_distance(np.zeros(3), eye, np.zeros(2), np.eye(2))
  with pytest.raises(ValueError, match=r"\[3\] and a covariance of \[2, 2\]"):
    frechet.frechet_distance(np.zeros(3), np.eye(2), np.zeros(3), eye)
  with pytest.raises(ValueError, match="not finite"):
    frechet.frechet_distance(np.zeros(3), eye * np.nan, np.zeros(3), eye)
  with pytest.raises(ValueError, match="not symmetric"):
    frechet.frechet_distance(np.zeros(3), eye, np.zeros(3), np.triu(np.ones((3, 3))))


def test_extrapolation_removes_the_bias():
  rng = np.random.default_rng(0)
  dim, n = 16, 2000
  reference = np.zeros(dim), np.eye(dim)
  features = 1.1 * rng.normal(size=(n, dim)) + 0.1
  truth = frechet.frechet_distance(np.full(dim, 0.1), 1.21 * np.eye(dim), *reference)
  result = frechet.fid_infinity(features, *reference, num_points=15, smallest=100)
  assert result.counts[0] == 100 and result.counts[-1] == n and len(result.distances) == 15
  np.testing.assert_allclose(result.distances[-1], frechet.frechet_distance(*gaussian(features), *reference))
  np.testing.assert_allclose(result.value, np.polyfit(1 / result.counts, result.distances, 1)[1], rtol=1e-9)
  assert result.distances[0] > 2 * truth
  assert abs(result.value - truth) < 0.5 * abs(result.distances[-1] - truth)
  again = frechet.fid_infinity(features, *reference, num_points=15, smallest=100)
  assert again.value == result.value
  assert frechet.fid_infinity(features, *reference, num_points=15, smallest=100, seed=1).value != result.value


def test_extrapolation_rejects_bad_input():
  reference = np.zeros(3), np.eye(3)
  with pytest.raises(ValueError, match="from smallest=5000 to 40 samples"):
    frechet.fid_infinity(np.zeros((40, 3)), *reference)
  with pytest.raises(ValueError, match="num_points=1 points"):
    frechet.fid_infinity(np.zeros((40, 3)), *reference, num_points=1, smallest=10)


# Files.


def make_statistics(dim=5, suffix=""):
  rng = np.random.default_rng(dim)
  return {f"mu{suffix}": rng.normal(size=dim), f"sigma{suffix}": np.cov(rng.normal(size=(dim, 20)))}


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), dtype=np.uint8)


def test_statistics_round_trip(tmp_path):
  both = make_statistics(5) | make_statistics(7, "_s")
  for name, given in (("pool.npz", make_statistics(5)), ("both.npz", both)):
    save_statistics(tmp_path / name, given)
    with np.load(tmp_path / name, allow_pickle=False) as file:  # as pytorch-fid and ADM read it
      assert set(file.files) == set(given)
    back = load_statistics(tmp_path / name)
    assert set(back) == set(given)
    for key, value in given.items():
      assert back[key].dtype == np.float64
      np.testing.assert_array_equal(back[key], value)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_files_of_other_programs(tmp_path, images, write):
  """ADM's reference batch: statistics, some in float32 or Fortran order, next to images and labels."""
  given = make_statistics(5) | make_statistics(7, "_s")
  given["mu"] = given["mu"].astype(np.float32)
  given["sigma"] = np.asfortranarray(given["sigma"])
  write(tmp_path / "VIRTUAL.npz", images, np.arange(11), **given)
  back = load_statistics(tmp_path / "VIRTUAL.npz")
  assert set(back) == set(given)
  for key, value in given.items():
    np.testing.assert_array_equal(back[key], value)
  samples = SampleFile(tmp_path / "VIRTUAL.npz")
  assert samples.shape == (11, 4, 6, 3)
  for size, lengths in ((4, [4, 4, 3]), (11, [11]), (50, [11])):
    batches = list(samples.batches(size))
    assert [len(batch) for batch in batches] == lengths
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_files_without_valid_statistics_are_refused(tmp_path, images):
  path = tmp_path / "x.npz"
  good = make_statistics()
  with pytest.raises(FileNotFoundError, match="no such file"):
    load_statistics(path)
  np.savez(path, images)
  with pytest.raises(ValueError, match="no arrays mu and sigma"):
    load_statistics(path)
  np.savez(path, mu=good["mu"], sigma=good["sigma"][:4])
  with pytest.raises(ValueError, match=r"mu and sigma: .*\[4, 5\]"):
    load_statistics(path)
  np.savez(path, **good, mu_s=good["mu"])
  with pytest.raises(ValueError, match="has only mu_s"):
    load_statistics(path)
  np.savez(path, mu=np.arange(5), sigma=good["sigma"])
  with pytest.raises(ValueError, match="mu is of type int64"):
    load_statistics(path)
  np.savez(path, mu=good["mu"], sigma=good["sigma"] * np.nan)
  with pytest.raises(ValueError, match="not finite"):
    load_statistics(path)


def test_invalid_statistics_are_not_saved(tmp_path):
  good = make_statistics()
  with pytest.raises(ValueError, match="named mu:"):
    save_statistics(tmp_path / "x.npz", {"mu": good["mu"]})
  with pytest.raises(ValueError, match="must end in .npz"):
    save_statistics(tmp_path / "x", good)
  with pytest.raises(ValueError, match="not symmetric"):
    save_statistics(tmp_path / "x.npz", good | {"sigma": np.triu(good["sigma"])})
  assert not list(tmp_path.iterdir())


def test_files_without_valid_images_are_refused(tmp_path, images):
  path = tmp_path / "x.npz"
  np.savez(path, **make_statistics())
  with pytest.raises(ValueError, match="no array arr_0"):
    SampleFile(path)
  for bad in (images.astype(np.float32), images[..., :1], images[0], images[:0], np.asfortranarray(images)):
    np.savez(path, bad)
    with pytest.raises(ValueError, match=r"arr_0 is .* not images of uint8 \[n, h, w, 3\]"):
      SampleFile(path)


def test_pickled_objects_are_not_loaded(tmp_path):
  class Canary:
    def __reduce__(self):
      return (tmp_path / "canary").touch, ()

  np.savez(tmp_path / "a.npz", mu=np.array([Canary()], object), sigma=np.eye(1))
  (tmp_path / "b.npz").write_bytes(pickle.dumps(Canary()))
  with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
    for name in ("mu.npy", "sigma.npy", "arr_0.npy"):
      archive.writestr(name, pickle.dumps(Canary()))
  for name in "abc":
    with pytest.raises(ValueError, match="not a complete .npz file of plain arrays"):
      load_statistics(tmp_path / f"{name}.npz")
  with pytest.raises(ValueError, match="not a complete .npz file of plain arrays"):
    SampleFile(tmp_path / "c.npz")
  assert not (tmp_path / "canary").exists()


def test_a_damaged_file_is_refused_or_read_correctly(tmp_path, images):
  path = tmp_path / "x.npz"
  given = make_statistics()
  rng = np.random.default_rng(0)
  refused = 0
  for write in (np.savez, np.savez_compressed):
    write(path, images, **given)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(150):
      damaged = whole[: rng.integers(len(whole))].copy() if rng.random() < 0.2 else whole.copy()
      places = rng.integers(len(damaged), size=rng.integers(1, 9)) if len(damaged) else []
      damaged[places] = rng.integers(0, 256, len(places))
      path.write_bytes(damaged.tobytes())
      for read in (load_statistics, lambda path: {"arr_0": np.concatenate(list(SampleFile(path).batches(4)))}):
        try:
          for key, value in read(path).items():
            np.testing.assert_array_equal(value, {"arr_0": images, **given}[key])
        except ValueError as e:
          assert len(str(e).splitlines()) == 1 and str(path) in str(e)
          refused += 1
  assert refused > 300
