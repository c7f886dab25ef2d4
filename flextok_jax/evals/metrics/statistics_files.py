"""Statistics and sample batches in .npz files, as other people's tools write and read them; nothing is unpickled.

- pytorch-fid: mu [d] and sigma [d, d], the mean and covariance of Inception's pool features.
- ADM (guided-diffusion's evaluations, the VIRTUAL_*.npz of its reference batches): the same, mu_s and sigma_s of its
  spatial features (for sFID), and the images themselves as arr_0. Sample batches have arr_0 alone.
"""

from collections.abc import Iterator, Mapping
import contextlib
import io
import math
import os
from pathlib import Path
import zipfile
import zlib

import numpy as np

from flextok_jax.core import files
from flextok_jax.evals.metrics.frechet import checked_gaussian

PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))
_SAMPLES = "arr_0"


def contents(path: str | os.PathLike) -> set[str]:
  """Returns the names of the arrays in a file.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a whole .npz.
  """
  with _opened(path) as archive:
    return {name.removesuffix(".npy") for name in archive.namelist()}


def load_statistics(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the statistics of a file in float64: "mu" [d] and "sigma" [d, d], "mu_s" and "sigma_s" where it has them.

  Images in the same file are not read.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a whole .npz, without statistics, or with ones that checked_gaussian refuses.
  """
  with _opened(path) as archive:
    names = {name for pair in PAIRS for name in pair if f"{name}.npy" in archive.namelist()}
    arrays = {name: _read(archive, name) for name in names}
  if not {"mu", "sigma"} <= names:
    raise ValueError(f"{path} has no arrays mu and sigma: it holds no statistics, compute them from its images")
  return _checked(path, arrays)


def save_statistics(path: str | os.PathLike, statistics: Mapping[str, np.ndarray]):
  """Writes "mu" and "sigma", and "mu_s" and "sigma_s" where given, in float64, whole or not at all.

  Raises:
    ValueError: other names, what checked_gaussian refuses, or a path that cannot be written.
  """
  if set(statistics) not in ({"mu", "sigma"}, {"mu", "sigma", "mu_s", "sigma_s"}):
    raise ValueError(f"statistics are named {', '.join(statistics)}: they are mu and sigma, and maybe mu_s and sigma_s")
  if not os.fspath(path).endswith(".npz"):
    raise ValueError(f"cannot write statistics to {path}: name a file that ends with .npz")
  buffer = io.BytesIO()
  np.savez(buffer, **_checked(path, statistics))
  files.write_file(Path(path), buffer.getvalue())


class SampleFile:
  """Images of a .npz, its arr_0 of uint8, read a batch at a time: 50,000 of 256 px are 10 GB.

  Attributes:
    shape: (n, h, w, 3).

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a whole .npz, or without uint8 images arr_0 [n, h, w, 3].
  """

  def __init__(self, path: str | os.PathLike):
    self._path = path
    with _opened(path) as archive:
      found = f"{_SAMPLES}.npy" in archive.namelist()
      if found:
        with archive.open(f"{_SAMPLES}.npy") as stream:
          self.shape, fortran, dtype = _header(archive, _SAMPLES, stream)
    if not found:
      raise ValueError(f"{path} has no array {_SAMPLES}: it holds no images")
    if dtype != np.uint8 or fortran or len(self.shape) != 4 or self.shape[3] != 3 or not all(self.shape):
      raise ValueError(f"{path}: {_SAMPLES} is {dtype} {list(self.shape)}, not images of uint8 [n, h, w, 3]")

  def batches(self, batch_size: int) -> Iterator[np.ndarray]:
    """Yields the images in order, uint8 [b, h, w, 3]; the last batch may be smaller.

    Raises:
      ValueError: damage to the file.
    """
    with _opened(self._path) as archive, archive.open(f"{_SAMPLES}.npy") as stream:
      _header(archive, _SAMPLES, stream)
      for start in range(0, self.shape[0], batch_size):
        shape = (min(batch_size, self.shape[0] - start), *self.shape[1:])
        images = np.frombuffer(stream.read(math.prod(shape)), np.uint8).reshape(shape)
        if start + len(images) == self.shape[0]:
          stream.read()  # to the end, where the checksum is compared
        yield images


def _checked(path: str | os.PathLike, statistics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  checked = {}
  for pair in PAIRS:
    given = [name for name in pair if name in statistics]
    if len(given) == 1:
      raise ValueError(f"{path} has {given[0]} alone of {' and '.join(pair)}: compute these statistics again")
    if given:
      try:
        checked.update(zip(pair, checked_gaussian(*(statistics[name] for name in pair))))
      except ValueError as e:
        raise ValueError(f"{path}, {' and '.join(pair)}: {e}") from None
  return checked


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
  """Opens a .npz; what is wrong with it, then or when its arrays are read, becomes one line."""
  if not os.path.isfile(path):
    raise FileNotFoundError(f"no such file: {path}")
  try:
    with zipfile.ZipFile(path) as archive:
      yield archive
  except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as e:
    reason = " ".join(str(e).split())
    raise ValueError(f"{path} is not a whole .npz file of plain arrays ({reason}): get or write it again") from None


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
  with archive.open(f"{name}.npy") as stream:
    shape, fortran, dtype = _header(archive, name, stream)
    if dtype.kind != "f":
      raise ValueError(f"{name} is of type {dtype}, not floating-point")
    return np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran else "C")


def _header(archive: zipfile.ZipFile, name: str, stream) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Reads shape, whether in Fortran's order, and type of an array, whose values follow in the stream."""
  version = np.lib.format.read_magic(stream)
  readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
  if version not in readers:
    raise ValueError(f"{name} is of .npy version {version}")
  shape, fortran, dtype = readers[version](stream)
  size = archive.getinfo(f"{name}.npy").file_size - stream.tell()
  if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
    raise ValueError(f"{name} is {dtype} {list(shape)} in {size} bytes")
  return shape, fortran, dtype
