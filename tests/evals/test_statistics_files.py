"""Files of statistics and samples: as numpy and other people's tools write them, and damaged."""

import pickle
import zipfile

import numpy as np
import pytest

from flextok_jax.evals.metrics.statistics_files import SampleFile, load_statistics, save_statistics


def make_statistics(dim=5, suffix=""):
  rng = np.random.default_rng(dim)
  return {f"mu{suffix}": rng.normal(size=dim), f"sigma{suffix}": np.cov(rng.normal(size=(dim, 20)))}


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), dtype=np.uint8)


def test_statistics_come_back(tmp_path):
  both = make_statistics(5) | make_statistics(7, "_s")
  for name, given in (("pool.npz", make_statistics(5)), ("both.npz", both)):
    save_statistics(tmp_path / name, given)
    with np.load(tmp_path / name, allow_pickle=False) as file:  # what pytorch-fid and ADM read
      assert set(file.files) == set(given)
    back = load_statistics(tmp_path / name)
    assert set(back) == set(given)
    for key, value in given.items():
      assert back[key].dtype == np.float64
      np.testing.assert_array_equal(back[key], value)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_files_of_others(tmp_path, images, write):
  """ADM's reference batch: statistics, some in float32 or in Fortran's order, beside images and labels."""
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


def test_what_is_no_statistics_is_refused(tmp_path, images):
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
  with pytest.raises(ValueError, match="mu_s alone"):
    load_statistics(path)
  np.savez(path, mu=np.arange(5), sigma=good["sigma"])
  with pytest.raises(ValueError, match="mu is of type int64"):
    load_statistics(path)
  np.savez(path, mu=good["mu"], sigma=good["sigma"] * np.nan)
  with pytest.raises(ValueError, match="not finite"):
    load_statistics(path)


def test_what_cannot_be_saved_is_refused(tmp_path):
  good = make_statistics()
  with pytest.raises(ValueError, match="named mu:"):
    save_statistics(tmp_path / "x.npz", {"mu": good["mu"]})
  with pytest.raises(ValueError, match="ends with .npz"):
    save_statistics(tmp_path / "x", good)
  with pytest.raises(ValueError, match="not symmetric"):
    save_statistics(tmp_path / "x.npz", good | {"sigma": np.triu(good["sigma"])})
  assert not list(tmp_path.iterdir())


def test_what_is_no_samples_is_refused(tmp_path, images):
  path = tmp_path / "x.npz"
  np.savez(path, **make_statistics())
  with pytest.raises(ValueError, match="no array arr_0"):
    SampleFile(path)
  for bad in (images.astype(np.float32), images[..., :1], images[0], images[:0], np.asfortranarray(images)):
    np.savez(path, bad)
    with pytest.raises(ValueError, match=r"arr_0 is .* not images of uint8 \[n, h, w, 3\]"):
      SampleFile(path)


def test_nothing_is_unpickled(tmp_path):
  class Canary:
    def __reduce__(self):
      return (tmp_path / "canary").touch, ()

  np.savez(tmp_path / "a.npz", mu=np.array([Canary()], object), sigma=np.eye(1))
  (tmp_path / "b.npz").write_bytes(pickle.dumps(Canary()))
  with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
    for name in ("mu.npy", "sigma.npy", "arr_0.npy"):
      archive.writestr(name, pickle.dumps(Canary()))
  for name in "abc":
    with pytest.raises(ValueError, match="not a whole .npz file of plain arrays"):
      load_statistics(tmp_path / f"{name}.npz")
  with pytest.raises(ValueError, match="not a whole .npz file of plain arrays"):
    SampleFile(tmp_path / "c.npz")
  assert not (tmp_path / "canary").exists()


def test_damage_gives_one_line_or_the_same_numbers(tmp_path, images):
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
