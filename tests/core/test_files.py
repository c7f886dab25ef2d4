"""Atomic file writes."""

import pytest

from flextok_jax.core import files


def test_writes_are_atomic(tmp_path):
  (tmp_path / "taken").mkdir()
  with pytest.raises(ValueError, match="cannot write"):
    files.write_file(tmp_path / "taken", b"x")
  with pytest.raises(ValueError, match="cannot write"):
    (tmp_path / "file").write_text("old")
    files.write_file(tmp_path / "file" / "below", b"x")
  files.write_file(tmp_path / "file", b"new")
  assert (tmp_path / "file").read_bytes() == b"new"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
