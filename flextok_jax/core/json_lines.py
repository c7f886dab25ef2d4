"""Files of JSON lines."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from absl import logging

from flextok_jax.core import files


class JsonLines:
  """A file of JSON lines to which records are appended, each of them whole or not at all.

  A last line that a killed process left half-written is cut off, with a warning; otherwise the next record would be
  appended to it.

  Args:
    path: of the file; made if missing.

  Raises:
    OSError: the file cannot be read or written.
  """

  def __init__(self, path: Path):
    self._path = path
    with self._failures_named():
      path.parent.mkdir(parents=True, exist_ok=True)
      if path.exists():
        files.check_regular(path)
      self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 closed in close()
      self._repair()

  def _repair(self):
    self._file.seek(0)
    *whole, last = self._file.read().split(b"\n")
    if not last:
      return
    try:
      json.loads(last)
      self._file.write(b"\n")  # only its end is missing
    except ValueError:
      self._file.truncate(sum(len(line) + 1 for line in whole))
      logging.warning("%s: the last line was half-written and has been cut off", self._path)

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends a record; OSError if the disk is full."""
    line = (json.dumps(record) + "\n").encode()
    size = os.fstat(self._file.fileno()).st_size
    with self._failures_named():
      try:
        while line:
          line = line[self._file.write(line) :]
      except OSError:
        self._file.truncate(size)
        raise

  def close(self) -> None:
    self._file.close()

  @contextlib.contextmanager
  def _failures_named(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      raise OSError(f"cannot write {files.printable(self._path)}: {e.strerror or e}") from e
