"""Checksums of the files of orbax checkpoints.

Every checkpoint has a file checksums.json, {name of an item: {file in it: SHA-256}}, which process 0 writes when all
items are complete, and before the checkpoint gets its name: so there is no checkpoint without it. The checksums are of
files and not of arrays, so that they hold for whatever mesh and number of processes read the checkpoint, and so that
nothing parses a damaged file.
"""

from collections.abc import Iterable
from concurrent import futures
import hashlib
import json

from etils import epath
import orbax.checkpoint as ocp

_FILE = "checksums.json"
_CHUNK = 2**20  # bytes read at once
_THREADS = 8  # files read at once


def write(checkpoints: epath.Path, step: int):
  """Writes the checksums of a complete checkpoint that still has orbax's temporary name, if it gets one at all."""
  folder = checkpoints / f"{step}{ocp.path.atomicity.TMP_DIR_SUFFIX}"
  folder = folder if folder.exists() else checkpoints / str(step)
  items = [path for path in folder.iterdir() if path.is_dir()]
  hashes = {item.name: _hash_files(item, (str(x.relative_to(item)) for x in _files(item))) for item in items}
  (folder / _FILE).write_text(json.dumps(hashes))


def verify(folder: epath.Path, items: Iterable[str], part: int = 0, parts: int = 1):
  """Compares files of a checkpoint with their checksums.

  Args:
    folder: of the checkpoint.
    items: to compare.
    part: every `parts`-th file is compared, from this one on: processes share the work.
    parts: number of parts.

  Raises:
    ValueError: a file is missing or differs; the line names the first.
  """
  try:
    hashes = json.loads((folder / _FILE).read_text())
    files = sorted((item, name) for item in items for name in hashes[item])[part::parts]
  except (OSError, ValueError, LookupError, TypeError) as e:
    raise ValueError(f"no checksums of its files, or damaged ones: {type(e).__name__}") from None
  for item, name in files:
    if not (folder / item / name).is_file():  # a FIFO would block
      raise ValueError(f"file {item}/{name} is missing")
  found = _hash_files(folder, (f"{item}/{name}" for item, name in files))
  for item, name in files:
    if found[f"{item}/{name}"] != hashes[item][name]:
      raise ValueError(f"file {item}/{name} differs from its checksum")


def _files(folder: epath.Path) -> list[epath.Path]:
  """Returns the files below a folder."""
  found = []
  for path in folder.iterdir():
    found += _files(path) if path.is_dir() else [path]
  return found


def _hash_files(folder: epath.Path, names: Iterable[str]) -> dict[str, str]:
  """Returns {name: SHA-256} of files in a folder."""

  def compute(name: str) -> str:
    digest = hashlib.sha256()
    with (folder / name).open("rb") as f:
      while chunk := f.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()

  names = list(names)
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(compute, names)))
