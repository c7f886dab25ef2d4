"""Partial results on disk, from which an interrupted evaluation or study resumes when it is run again."""

from collections.abc import Callable, Mapping
import io
import json
from pathlib import Path
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from flextok_jax.core import files, npz
from flextok_jax.core.progress import Bar, write
from flextok_jax.parallel import processes

Result = tuple[Any, dict[str, np.ndarray]]  # what JSON can hold, and arrays


class Progress:
  """Keeps the results of the parts of a long computation, one file per part, and shows how far it is.

  Process 0 reads and writes. A file is used only if it was written with the same settings.

  Args:
    folder: of the files PART.npz; None: nothing is kept or shown.
    settings: JSON-able, all settings that the results depend on.
    every: batches between two writes of a part that is computed batch by batch.
  """

  def __init__(self, folder: Path | None = None, settings: Mapping[str, Any] | None = None, every: int = 20):
    self.folder = folder
    self.settings = dict(settings or {})
    self._every = every
    self._batches = 0
    self._bar: Bar | None = None  # of the part that is computed

  def nested(self, name: str, settings: Mapping[str, Any]) -> "Progress":
    """Returns the progress of a part that has parts itself, in a folder of its name, with more settings."""
    folder = None if self.folder is None else self.folder / name
    return Progress(folder, self.settings | dict(settings), self._every)

  # Parts that are computed at once.

  def compute(self, part: str, settings: Mapping[str, Any], function: Callable[[], Result]) -> Result:
    """Returns (JSON-able, arrays) of a part: from its file, or else from the function, and then written.

    Args:
      settings: more settings that this part depends on.
    """
    settings = self.settings | dict(settings)
    found = self._read(part, settings)
    if found is not None:
      write(f"{part}: computed before with these settings")
      return found
    start = time.monotonic()
    values, arrays = function()
    self._write(part, settings, values, arrays)
    write(f"{part}: {time.monotonic() - start:.1f} s")
    return json.loads(json.dumps(values)), arrays

  # Parts that are computed batch by batch.

  def resume(self, part: str, total: int) -> tuple[int, dict[str, np.ndarray]]:
    """Returns how many of a part's `total` images are done, and their results, which only process 0 gets."""
    if self.folder is None:
      return 0, {}
    done, arrays = 0, {}
    if processes.is_process_0():
      done, arrays = self._read(part, self.settings) or (0, {})
    if jax.process_count() > 1:
      done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    if done:
      processes.log_on_process_0(f"{part}: resuming after {done} images, from {self._path(part)}")
    self._bar = Bar(total, f"images of {part}", done=done)
    return done, arrays

  def after_batch(self, part: str, done: int, total: int, arrays: Callable[[], dict[str, np.ndarray]]):
    """Shows, and writes from time to time, that `done` of `total` images are done; arrays() returns the results."""
    if self.folder is None:
      return
    self._batches += 1
    if processes.is_process_0() and (self._batches % self._every == 0 or done == total):
      self._write(part, self.settings, done, arrays())
    if self._bar is not None:
      self._bar(done)
      if done == total:
        self._bar.close()

  def clear(self):
    """Removes the files."""
    if self.folder is not None and processes.is_process_0():
      for path in self.folder.glob("*.npz"):
        path.unlink()
      if self.folder.is_dir():
        self.folder.rmdir()

  # Files.

  def _path(self, part: str) -> Path:
    assert self.folder is not None
    return self.folder / f"{part}.npz"

  def _write(self, part: str, settings: Mapping[str, Any], result: Any, arrays: Mapping[str, Any]):
    content = io.BytesIO()
    named: dict[str, Any] = {f"array_{name}": x for name, x in arrays.items()}
    np.savez(content, **named, settings=_json(settings), values=json.dumps(result))
    files.write_file(self._path(part), content.getvalue())

  def _read(self, part: str, settings: Mapping[str, Any]) -> Result | None:
    path = self._path(part)
    if not path.is_file():
      return None
    try:
      with npz.opened(path) as archive:
        if npz.read(archive, "settings", "U").item() != _json(settings):
          print(f"{path} was written with other settings or weights: {part} starts over", flush=True)
          return None
        named = [name for name in npz.names(archive) if name.startswith("array_")]
        arrays = {name.removeprefix("array_"): npz.read(archive, name) for name in named}
        return json.loads(npz.read(archive, "values", "U").item()), arrays
    except ValueError:
      print(f"{path} is damaged: {part} starts over", flush=True)
      return None


def _json(settings: Mapping[str, Any]) -> str:
  return json.dumps(settings, sort_keys=True, default=str)
