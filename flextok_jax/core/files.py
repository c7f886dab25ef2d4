"""Atomic writes."""

import os
from pathlib import Path


def write_file(path: Path, data: bytes):
  """Writes a file atomically: to a temporary name in the same folder, which is then renamed.

  Raises:
    ValueError: the path cannot be written.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(data)
    os.replace(temporary, path)
  except OSError as e:
    if temporary.is_file():
      temporary.unlink()
    raise ValueError(f"cannot write {path}: {e.strerror}") from e
