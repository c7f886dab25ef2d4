"""Reading of .npz files: arrays without pickled objects, whose sizes are known before anything is allocated."""

from collections.abc import Iterator
import contextlib
import math
import os
from typing import IO
import zipfile

import numpy as np

from flextok_jax.core.errors import first_line

# A compressed array may be larger than this only if it expands to at most MAX_RATIO times its bytes in the file.
MAX_EXPANDED = 2**28  # bytes
MAX_RATIO = 8


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
  """Opens a .npz file; errors then, or in the body, which reads arrays, become a ValueError of one line.

  Raises:
    FileNotFoundError: no such file.
    ValueError: see above.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f"no such file: {path}")
  try:
    with zipfile.ZipFile(path) as archive:
      yield archive
  except Exception as e:  # zipfile, zlib, tokenize and numpy raise many types for damaged files
    raise ValueError(
      f"{path} is not a complete .npz file of plain arrays ({first_line(e, 200)}): download or write it again"
    ) from None


def names(archive: zipfile.ZipFile) -> list[str]:
  """Returns the names of the arrays."""
  return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read(archive: zipfile.ZipFile, name: str, kinds: str = "") -> np.ndarray:
  """Returns an array whose type is one of `kinds`, characters of numpy's dtype.kind; "": any."""
  member = archive.getinfo(f"{name}.npy")
  if member.file_size > max(MAX_EXPANDED, MAX_RATIO * member.compress_size):
    raise ValueError(
      f"{name} expands from {member.compress_size} to {member.file_size} bytes: write it uncompressed, by numpy.savez"
    )
  with open_array(archive, name) as stream:
    shape, fortran, dtype = header(archive, name, stream)
    if kinds and dtype.kind not in kinds:
      raise ValueError(f"{name} is of type {dtype}")
    return np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran else "C")


def open_array(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
  """Opens the bytes of an array, which `header` reads first."""
  if archive.getinfo(f"{name}.npy").compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise ValueError(f"{name} is compressed by another method than deflate")
  return archive.open(f"{name}.npy")


def header(archive: zipfile.ZipFile, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Reads (shape, whether in Fortran order, dtype) of an array, whose values, as many as that, follow in the stream."""
  version = np.lib.format.read_magic(stream)
  readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
  if version not in readers:
    raise ValueError(f"{name} has .npy version {version}")
  shape, fortran, dtype = readers[version](stream)
  size = archive.getinfo(f"{name}.npy").file_size - stream.tell()
  if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
    raise ValueError(f"{name} is {dtype} {list(shape)} in {size} bytes")
  return shape, fortran, dtype
