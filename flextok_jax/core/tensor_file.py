"""Safetensors files, read and written one tensor at a time, so that memory for one tensor is enough."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from flextok_jax.core import files
from flextok_jax.core.errors import first_line

CONVERT = "convert it by python -m flextok_jax.convert SOURCE TARGET.safetensors"  # a remedy, for errors

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
CHECKSUM = "flextok_jax.sha256"  # metadata entry of our files: of the other entries and of all tensors
_ALIGNMENT = 64  # bytes; on a CPU, jax copies host memory that is not aligned


_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts of names, of torch.compile etc.
_DATA_PARALLEL = "module."  # in front of all names


class Tensors(Mapping[str, np.ndarray]):
  """Tensors by their names; each is read whenever it is asked for.

  Attributes:
    path: of the file, or of the index of several files.
    metadata: of the file.
    shapes: {name: shape}.
    dtypes: {name: type}.
  """

  path: str
  metadata: Mapping[str, str]
  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, np.dtype]

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor."""
    raise NotImplementedError

  def verify(self):
    """Raises ValueError if there is a checksum that differs from that of the tensors, all of which were read."""

  def __getitem__(self, name: str) -> np.ndarray:
    return self.read(name)

  def __contains__(self, name: object) -> bool:
    return name in self.shapes

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


class TensorFile(Tensors):
  """The tensors of a safetensors file, without those whose names begin with one of `ignored`, whatever their type.

  Names lack what data parallelism and torch.compile add to them ("module.", "_orig_mod."), see unwrap.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is damaged, or holds a tensor that is not float32, float16 or bfloat16.
  """

  def __init__(self, path: str | os.PathLike, ignored: tuple[str, ...] = ()):
    self.path = os.fspath(path)
    if not os.path.isfile(self.path):
      raise FileNotFoundError(f"no such file: {self.path}")
    with self._open() as f:
      self.metadata = f.metadata() or {}
      self.shapes, self.dtypes = {}, {}
      self._digests: dict[str, bytes] = {}
      with named(self.path):
        self._stored = unwrap(f.keys())
      for name, stored in self._stored.items():
        if name.startswith(ignored):
          continue
        tensor = f.get_slice(stored)
        dtype = tensor.get_dtype()
        if dtype not in DTYPES:
          raise ValueError(f"{self.path}: tensor {name!r:.80} is of type {dtype}, only {', '.join(DTYPES)} are read")
        self.shapes[name] = tuple(tensor.get_shape())
        self.dtypes[name] = DTYPES[dtype]

  def _open(self):
    try:
      return safetensors.safe_open(self.path, "numpy")
    except (safetensors.SafetensorError, OSError) as e:
      with open(self.path, "rb") as f:
        pickled = f.read(2) in (b"PK", b"\x80\x02")
      remedy = f"if it is PyTorch's, {CONVERT}" if pickled else "download or write it again"
      raise ValueError(f"{self.path} is not a whole safetensors file ({first_line(e, 160)}): {remedy}") from None

  def read(self, name: str) -> np.ndarray:
    # Opened for each read: pages of a mapped file count as memory of the process until it is unmapped.
    with self._open() as f:
      tensor = f.get_tensor(self._stored[name])
    if CHECKSUM in self.metadata:
      self._digests[name] = _hash_tensor(name, tensor)
    return tensor

  def verify(self):
    found = self.metadata.get(CHECKSUM)
    if found is not None and found != _hash_all(self.metadata, self._digests):
      raise ValueError(f"{self.path} is damaged: it differs from the checksum in it; download or write it again")


class Shards(Tensors):
  """The tensors of several safetensors files with an index; a file is opened when one of its tensors is asked for.

  Args:
    path: of the index.
    files: {name of a tensor: name of its file}.
    open_file: from the name of a file to the file.
  """

  def __init__(self, path: str, files: Mapping[str, str], open_file: Callable[[str], TensorFile]):
    self.path, self.metadata = path, {}
    self._files, self._open = {name: files[stored] for name, stored in unwrap(files).items()}, open_file
    self.shapes = _Lazy(self._files, lambda name: self._file(name).shapes[name])
    self.dtypes = _Lazy(self._files, lambda name: self._file(name).dtypes[name])

  def _file(self, name: str) -> TensorFile:
    file = self._open(self._files[name])
    if name not in file.shapes:
      raise ValueError(f"{file.path} lacks the tensor {name!r:.80}, which the index says it has")
    return file

  def read(self, name: str) -> np.ndarray:
    return self._file(name).read(name)


class _Lazy(Mapping[str, Any]):
  """A mapping whose values are computed when they are asked for."""

  def __init__(self, names: Collection[str], make: Callable[[str], Any]):
    self._names, self._make = names, make

  def __getitem__(self, name: str) -> Any:
    if name not in self._names:
      raise KeyError(name)
    return self._make(name)

  def __contains__(self, name: object) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def unwrap(names: Iterable[str]) -> dict[str, str]:
  """Returns {name of a tensor without what wrappers of modules add: its name in the file}.

  Raises:
    ValueError: two tensors have the same name then.
  """
  found: dict[str, str] = {}
  for stored in names:
    name = ".".join(part for part in stored.split(".") if part not in _WRAPPERS)
    if name in found:
      raise ValueError(f"tensors {found[name]!r:.80} and {stored!r:.80} are the same parameter: save one of them")
    found[name] = stored
  while found and all(name.startswith(_DATA_PARALLEL) for name in found):
    found = {name.removeprefix(_DATA_PARALLEL): stored for name, stored in found.items()}
  return found


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
  files.clear_leftovers(path.parent, [path.name])
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
