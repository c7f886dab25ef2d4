"""Weights of perception networks in local .safetensors and .npz files. Nothing is unpickled."""

from collections.abc import Iterable, Mapping
import os

from flax.traverse_util import unflatten_dict
import numpy as np

from flextok_jax.core import npz, tensor_file
from flextok_jax.weights.layout import Entry


def read(path: str | os.PathLike, ignored: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
  """Returns the tensors of a file as float32, without those whose names begin with one of `ignored`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: neither .safetensors nor .npz, damaged, or with arrays that are not of floating-point numbers.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f"no such file: {path}")
  if path.endswith(".safetensors"):
    file = tensor_file.TensorFile(path, ignored)
    return {name: file.read(name).astype(np.float32) for name in file.shapes}
  if not path.endswith(".npz"):
    raise ValueError(f"{path} is neither .safetensors nor .npz: if it is PyTorch's, {tensor_file.CONVERT}")
  with npz.opened(path) as archive:
    arrays = {name: npz.read(archive, name) for name in npz.names(archive) if not name.startswith(ignored)}
  for name, array in arrays.items():
    if array.dtype.kind != "f":
      raise ValueError(f"{path}: {name!r:.80} is of type {array.dtype}, only floating-point arrays are read")
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def fill(
  path: str | os.PathLike, tensors: Mapping[str, np.ndarray], entries: Iterable[Entry], allowed: Iterable[str] = ()
) -> dict:
  """Makes the nested float32 parameters that the entries describe.

  Args:
    path: of the file, for errors.
    tensors: {official name: tensor}.
    entries: of the parameters.
    allowed: names of tensors that are ignored.

  Raises:
    ValueError: a tensor is missing, left over or of another shape.
  """
  path, entries = os.fspath(path), list(entries)
  tensor_file.check_names(path, tensors, (name for e in entries for name in e.names), allowed)

  def make(e: Entry) -> np.ndarray:
    def read(name: str) -> np.ndarray:
      tensor = tensors[name]
      e.check_shape(name, tensor.shape)
      return tensor

    return e.from_official(read, np.dtype(np.float32))

  with tensor_file.named(path):
    return unflatten_dict({e.path: make(e) for e in entries}, sep="/")
