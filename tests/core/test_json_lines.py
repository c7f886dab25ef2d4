"""Records appended to files of JSON lines."""

import contextlib
import json
import os

import pytest

from flextok_jax.core import json_lines


@pytest.mark.parametrize("left", [b'{"step": 2, "lo', b"\0\0\0", b'{"step": 2}', b'{"step": 2}\n', b"\xff\xfe {"])
def test_a_half_written_last_line_does_not_swallow_the_next_record(tmp_path, caplog, left):
  path = tmp_path / "new" / "metrics.jsonl"
  with contextlib.closing(json_lines.JsonLines(path)) as lines:
    lines.write({"step": 1})
  path.write_bytes(path.read_bytes() + left)
  for step in (3, 4):
    with contextlib.closing(json_lines.JsonLines(path)) as lines:
      lines.write({"step": step})
  whole = b"}" in left
  found = [json.loads(line)["step"] for line in path.read_text().splitlines()]
  assert found == ([1, 2, 3, 4] if whole else [1, 3, 4])
  assert caplog.text.count("half-written") == (not whole)


def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "eval.jsonl"
  lines = json_lines.JsonLines(path)
  lines.write({"step": 1})

  class FullDisk:
    def __init__(self, file):
      self.file, self.room = file, 7

    def write(self, data):
      if not self.room:
        raise OSError(28, "No space left on device")
      written = self.file.write(data[: self.room])
      self.room -= written
      return written

    def __getattr__(self, name):
      return getattr(self.file, name)

  monkeypatch.setattr(lines, "_file", FullDisk(lines._file))
  with pytest.raises(OSError, match="cannot write .*eval.jsonl: No space left on device"):
    lines.write({"step": 2})
  lines.close()
  assert path.read_text() == '{"step": 1}\n'
  os.mkfifo(tmp_path / "fifo")
  with pytest.raises(OSError, match="is a FIFO"):
    json_lines.JsonLines(tmp_path / "fifo")
