"""Long evaluations: lines on the way, and results so far in a file, with which a killed one goes on when run again."""

from collections.abc import Mapping
import hashlib
import io
import json
from pathlib import Path
from typing import Any
import zipfile

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from flextok_jax.core import files
from flextok_jax.parallel import processes

_LINES = 10  # about a part, at most
_SETTINGS = "settings"


def identity(params: Any) -> str:
  """Returns 16 hex digits that tell parameter trees apart: shapes, and the sum of each array's bits."""
  leaves = jax.tree.leaves(params)
  bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32).sum()
  sums = jax.device_get(jax.jit(lambda leaves: [bits(x) for x in leaves])(leaves))
  text = json.dumps([(list(x.shape), str(x.dtype), int(s)) for x, s in zip(leaves, sums)])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


class Progress:
  """Keeps what parts of an evaluation have so far.

  Process 0 reads and writes; the others learn where to go on.

  Args:
    folder: of the files, one a part, PART.npz; None: nothing is kept, and nothing said.
    settings: JSON-able, all that results depend on: a file with others is not gone on with.
    every: batches between two writes.
  """

  def __init__(self, folder: Path | None = None, settings: Mapping[str, Any] | None = None, every: int = 20):
    self._folder = folder
    self._settings = json.dumps(settings, sort_keys=True, default=str)
    self._every = every
    self._batches = 0
    self._told = {}  # tenths of each part

  def load(self, part: str) -> tuple[int, dict[str, np.ndarray]]:
    """Returns how many images of a part are done, and their results, which others than process 0 do not get."""
    if self._folder is None:
      return 0, {}
    done, arrays = 0, {}
    if processes.is_process_0():
      done, arrays = self._read(part)
    if jax.process_count() > 1:
      done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    if done:
      processes.log_on_process_0(f"{part}: going on after {done} images, by {self._path(part)}")
    return done, arrays

  def after_batch(self, part: str, done: int, total: int, arrays: Any):
    """Tells and keeps, when it is time, that `done` of `total` images are done; arrays() returns the results."""
    if self._folder is None:
      return
    self._batches += 1
    if processes.is_process_0() and (self._batches % self._every == 0 or done == total):
      content = io.BytesIO()
      np.savez(content, **arrays(), **{_SETTINGS: np.array(self._settings), "done": np.array(done)})
      files.write_file(self._path(part), content.getvalue())
    if done * _LINES // total > self._told.get(part, 0):
      self._told[part] = done * _LINES // total
      processes.log_on_process_0(f"{part}: {done} of {total} images")

  def clear(self):
    """Removes the files: everything is in the report."""
    if self._folder is not None and processes.is_process_0():
      for path in self._folder.glob("*.npz"):
        path.unlink()
      if self._folder.is_dir():
        self._folder.rmdir()

  def _path(self, part: str) -> Path:
    return self._folder / f"{part}.npz"

  def _read(self, part: str) -> tuple[int, dict[str, np.ndarray]]:
    path = self._path(part)
    if not path.is_file():
      return 0, {}
    try:
      with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
      settings, done = str(arrays.pop(_SETTINGS)), int(arrays.pop("done"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      print(f"{path} is damaged: {part} begins anew", flush=True)
      return 0, {}
    if settings != self._settings:
      print(f"{path} is of other settings or weights: {part} begins anew", flush=True)
      return 0, {}
    return done, arrays
