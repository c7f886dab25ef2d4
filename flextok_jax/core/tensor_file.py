"""Safetensors files, read and written one tensor at a time, so that memory for one tensor is enough."""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from flextok_jax.core import files

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
CHECKSUM = "flextok_jax.sha256"  # metadata entry of our files: of the other entries and of all tensors
_ALIGNMENT = 64  # bytes; on a CPU, jax copies host memory that is not aligned


class TensorFile:
  """Names, types and shapes in a safetensors file; tensors are read one by one.

  Tensors whose names begin with one of `ignored` are left out, whatever their type.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is damaged, or holds a tensor that is not float32, float16 or bfloat16.
  """

  def __init__(self, path: str | os.PathLike, ignored: tuple[str, ...] = ()):
    self.path = os.fspath(path)
    if not os.path.isfile(self.path):
      raise FileNotFoundError(f"no such file: {self.path}")
    with self._open() as f:
      self.metadata: dict[str, str] = f.metadata() or {}
      self.shapes: dict[str, tuple[int, ...]] = {}
      self.dtypes: dict[str, np.dtype] = {}
      self._digests: dict[str, bytes] = {}
      for name in f.keys():  # noqa: SIM118 not a dict
        if name.startswith(ignored):
          continue
        tensor = f.get_slice(name)
        dtype = tensor.get_dtype()
        if dtype not in DTYPES:
          raise ValueError(f"{self.path}: tensor {name!r:.80} is of type {dtype}, only {', '.join(DTYPES)} are read")
        self.shapes[name] = tuple(tensor.get_shape())
        self.dtypes[name] = DTYPES[dtype]

  def _open(self):
    try:
      return safetensors.safe_open(self.path, "numpy")
    except (safetensors.SafetensorError, OSError) as e:
      raise ValueError(f"{self.path} is not a whole safetensors file ({e}): download or write it again") from None

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor."""
    # Opened for each read: pages of a mapped file count as memory of the process until it is unmapped.
    with self._open() as f:
      tensor = f.get_tensor(name)
    if CHECKSUM in self.metadata:
      self._digests[name] = _hash_tensor(name, tensor)
    return tensor

  def verify(self):
    """Raises ValueError if the file has a checksum that differs from that of its tensors, all of which were read."""
    found = self.metadata.get(CHECKSUM)
    if found is not None and found != _hash_all(self.metadata, self._digests):
      raise ValueError(f"{self.path} is damaged: it differs from the checksum in it; download or write it again")


@contextlib.contextmanager
def named(path: str):
  """Puts a file's name before the message of a ValueError about its content, unless it is there."""
  try:
    yield
  except ValueError as e:
    raise ValueError(str(e) if str(e).startswith(path) else f"{path}: {e}") from None


def check_names(path: str, have: Iterable[str], want: Iterable[str], allowed: Iterable[str] = ()):
  """Raises ValueError naming the first tensor that is missing or not wanted; `allowed` ones are ignored."""
  have, want = set(have), set(want)
  missing, extra = sorted(want - have), sorted(have - want - set(allowed))
  if missing:
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    raise ValueError(f"{path} lacks the tensor {missing[0]}{more}, which its configuration asks for")
  if extra:
    more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
    raise ValueError(f"{path} has a tensor {extra[0]!r:.120}{more} that its configuration has no place for")


def _hash_tensor(name: str, tensor: np.ndarray) -> bytes:
  digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
  digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
  return digest.digest()


def _hash_all(metadata: Mapping[str, str], digests: Mapping[str, bytes]) -> str:
  """Returns the checksum of a file with these entries and these {name: digest} of tensors, in whatever order."""
  entries = sorted((name, text) for name, text in metadata.items() if name != CHECKSUM)
  tensors = sorted((name, digest.hex()) for name, digest in digests.items())
  return hashlib.sha256(json.dumps([entries, tensors]).encode()).hexdigest()


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an uninitialised array that jax can use on a CPU without a copy."""
  size = math.prod(shape) * dtype.itemsize
  buffer = np.empty(size + _ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % _ALIGNMENT
  return buffer[start : start + size].view(dtype).reshape(shape)


def write(
  path: str | os.PathLike,
  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...], Callable[[], np.ndarray]]],
  metadata: Mapping[str, str],
  checksum: bool = False,
):
  """Writes {name: (dtype, shape, function that returns the tensor)} in this order, atomically.

  Args:
    path: of the file.
    tensors: see above.
    metadata: entries of the header.
    checksum: add the entry CHECKSUM, which TensorFile.verify checks.

  Raises:
    ValueError: the path cannot be written.
  """
  codes = {dtype: code for code, dtype in DTYPES.items()}
  unknown = "0" * 64  # until all tensors are written
  header: dict = {"__metadata__": {**metadata, CHECKSUM: unknown} if checksum else dict(metadata)}
  digests = {}
  offset = 0
  for name, (dtype, shape, _) in tensors.items():
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the format requires aligned data
  path = Path(path)
  files.clear_leftovers([path])
  with files.replacing(path) as temporary, open(temporary, "wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for name, (dtype, shape, make) in tensors.items():
      tensor = np.asarray(jax.device_get(make())).astype(dtype, order="C", copy=False)
      assert tensor.shape == shape
      f.write(tensor.reshape(-1).view(np.uint8).data)
      if checksum:
        digests[name] = _hash_tensor(name, tensor)
    if checksum:
      f.seek(8 + text.index(f'"{CHECKSUM}":"{unknown}"'.encode()) + len(CHECKSUM) + 4)
      f.write(_hash_all(metadata, digests).encode())
