"""Weights of the networks that evaluation looks through: local .safetensors and .npz files; nothing is unpickled."""

from collections.abc import Iterable, Mapping
import os
import zipfile

from flax.traverse_util import unflatten_dict
import numpy as np

from flextok_jax.core import tensor_file
from flextok_jax.weights.names import Entry


def read(path: str | os.PathLike, ignored: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
  """Returns the tensors of a file as float32, those aside whose names begin with one of `ignored`.

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
    raise ValueError(
      f"{path} is neither .safetensors nor .npz: write PyTorch's files anew by "
      "python -m flextok_jax.convert_torch SOURCE TARGET.safetensors"
    )
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files if not name.startswith(ignored)}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f"{path} is not a whole .npz file of plain arrays ({e}): download or write it again") from None
  for name, array in arrays.items():
    if array.dtype.kind != "f":
      raise ValueError(f"{path}: {name!r:.80} is of type {array.dtype}, only floating-point arrays are read")
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def fill(
  path: str | os.PathLike, tensors: Mapping[str, np.ndarray], entries: Iterable[Entry], allowed: Iterable[str] = ()
) -> dict:
  """Returns the parameters that the entries describe, nested, float32.

  Args:
    path: of the file, for errors.
    tensors: by their official names.
    entries: our arrays and where they stand among the tensors.
    allowed: names of tensors that may be there without use.

  Raises:
    ValueError: a tensor is missing, left over or of another shape.
  """
  entries = list(entries)
  tensor_file.check_names(os.fspath(path), tensors, (name for e in entries for name in e.names), allowed)
  flat = {}
  for e in entries:
    for i, name in enumerate(e.names):
      tensor = tensors[name]
      if tensor.shape != e.official_shape:
        raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, not {list(e.official_shape)}")
      if i == 0:  # not before: a foreign configuration may ask for more memory than there is
        flat[e.path] = np.empty(e.shape, np.float32)
      e.from_official(tensor, flat[e.path], i)
  return unflatten_dict(flat, sep="/")
