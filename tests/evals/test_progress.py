"""Partial results of studies; those of evaluations are tested in tests/evals/test_reconstruction.py."""

import numpy as np
import pytest

from flextok_jax.evals.progress import Progress


def test_an_interrupted_study_resumes_after_its_last_part(tmp_path, capsys):
  """Results with other settings and damaged files are computed again."""
  computed = []

  def part(name, alive=True):
    computed.append(name)
    if not alive:
      raise KeyboardInterrupt
    return {"value": (name, 0.1)}, {"a": np.arange(3)}

  def go_on(settings, alive=True):
    computed.clear()
    progress = Progress(tmp_path, settings)
    return [progress.compute(name, {"name": name}, lambda: part(name, alive or name != "b")) for name in "abc"]  # noqa: B023

  with pytest.raises(KeyboardInterrupt):
    go_on({"seed": 0}, alive=False)
  first = go_on({"seed": 0})
  assert computed == ["b", "c"] and "a: computed before with these settings" in capsys.readouterr().out
  again = go_on({"seed": 0})
  assert not computed
  for (x, arrays), (y, more) in zip(first, again):
    assert x == y and x["value"][1] == 0.1
    np.testing.assert_array_equal(arrays["a"], more["a"])
  (tmp_path / "b.npz").write_bytes(b"PK")
  go_on({"seed": 0})
  assert computed == ["b"]
  go_on({"seed": 1})
  assert computed == ["a", "b", "c"]
