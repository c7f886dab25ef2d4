"""Samples in the .npz that the field's evaluators take, arr_0 uint8 [n, h, w, 3], written as they come."""

from pathlib import Path

import numpy as np


class SampleWriter:
  """Collects images in PATH.part.npy and makes PATH of them, a .npz file.

  Args:
    path: of the .npz.
    shape: of all images, (n, h, w, 3).
    first: how many an earlier writer has left in the part.

  Raises:
    ValueError: there is no such part, or it cannot be written.
  """

  def __init__(self, path: Path, shape: tuple[int, int, int, int], first: int = 0):
    self._path, self._part = path, path.with_suffix(".part.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      if first:
        self._images = np.lib.format.open_memmap(self._part, mode="r+")
      else:
        self._images = np.lib.format.open_memmap(self._part, mode="w+", dtype=np.uint8, shape=shape)
    except (OSError, ValueError) as e:
      raise ValueError(
        f"{self._part} cannot be {'gone on with' if first else 'written'} ({e}): give another --out to begin anew"
      ) from None
    if self._images.shape != shape or self._images.dtype != np.uint8:
      raise ValueError(f"{self._part} is not of {shape[0]} such samples: remove it to begin anew")

  def write(self, start: int, images: np.ndarray):
    """Writes images uint8 [b, h, w, 3] from number `start` on, to disk when this returns."""
    self._images[start : start + len(images)] = images
    self._images.flush()

  def finish(self):
    """Makes the .npz, in its place only when it is whole."""
    whole = self._path.with_name(f".{self._path.name}")
    np.savez(whole, arr_0=self._images)
    whole.replace(self._path)
    self._part.unlink()
