"""Converts PyTorch files to safetensors. Only tensors and plain values are unpickled."""

from collections.abc import Mapping
import functools
import os
from typing import Any

import numpy as np

from flextok_jax.core import extras, tensor_file

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")  # of PyTorch files


def convert(source: str, target: str) -> tuple[int, list[str]]:
  """Writes the floating-point tensors of a PyTorch file as float32 to a .safetensors file.

  Args:
    source: a file of tensors in dictionaries.
    target: path to write, which must not exist.

  Returns:
    (number of tensors written, names of the values that are left out).

  Raises:
    FileNotFoundError: the source does not exist.
    MissingPackageError: PyTorch is not installed.
    ValueError: a source without such tensors, or a target that exists or is not a .safetensors file.
  """
  if not target.endswith(".safetensors"):
    raise ValueError(f"{target} must end with .safetensors")
  if os.path.exists(target):
    raise ValueError(f"{target} already exists: remove it, or give another path")
  values = load(source)
  if not isinstance(values, Mapping):
    raise ValueError(f"{source} holds no dictionary of tensors, but {type(values).__name__!r:.80}")
  tensors, others = flatten(values)
  if not tensors:
    raise ValueError(f"{source} holds no tensor of floating-point numbers")
  float32 = np.dtype(np.float32)
  makers = {name: (float32, tuple(x.shape), functools.partial(to_numpy, x)) for name, x in tensors.items()}
  tensor_file.write(target, makers, {})
  return len(tensors), others


def load(path: str) -> Any:
  """Loads a PyTorch file of tensors and plain values to the CPU.

  Raises:
    FileNotFoundError: the file does not exist.
    MissingPackageError: PyTorch is not installed.
    ValueError: a file that is damaged or holds anything else.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f"no such file: {path}")
  torch = extras.require("torch", "eval", path)
  try:
    return torch.load(path, map_location="cpu", weights_only=True)
  except Exception as e:  # PyTorch raises many kinds for damaged and foreign files
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise ValueError(f"{path} is not a whole PyTorch file of tensors alone ({reason:.200})") from None


def flatten(values: Mapping) -> tuple[dict[str, Any], list[str]]:
  """Collects the floating-point tensors in nested dictionaries.

  Returns:
    ({name: tensor}, names of all other values). Keys are joined by dots; a dictionary that alone holds the tensors
    ("state_dict", "model", ...) is not part of the names.
  """
  tensors, others = {}, []

  def visit(prefix: str, values: Mapping):
    for key, value in values.items():
      name = f"{prefix}{key}"
      if isinstance(value, Mapping):
        visit(f"{name}.", value)
      elif hasattr(value, "is_floating_point") and value.is_floating_point():
        tensors[name] = value
      else:
        others.append(name)

  inner = [value for value in values.values() if isinstance(value, Mapping) and flatten(value)[0]]
  if len(inner) == 1 and not any(hasattr(value, "is_floating_point") for value in values.values()):
    return flatten(inner[0])
  visit("", values)
  return tensors, others


def to_numpy(tensor: Any) -> np.ndarray:
  """Returns a PyTorch tensor of any type as float32."""
  return tensor.detach().float().numpy()
