"""Writes the tensors of a PyTorch file anew as .safetensors, which the networks of evaluation are read from.

python -m flextok_jax.convert_torch SOURCE.pth TARGET.safetensors

Alone of all commands it needs PyTorch; nothing but tensors and plain values is unpickled. TARGET must not exist.
Tensors of floating-point numbers are written as float32 in the names that they have; those of nested dictionaries are
joined by dots, and a dictionary that alone holds tensors ("state_dict", "model", ...) adds nothing to the names.
"""

from collections.abc import Mapping
import os
from typing import Any

import numpy as np

from flextok_jax import cli
from flextok_jax.core import extras, tensor_file


def main(source: str, target: str):
  """Converts `source` to `target`."""
  if not target.endswith(".safetensors"):
    raise ValueError(f"{target} must end with .safetensors")
  if os.path.exists(target):
    raise ValueError(f"{target} is there already: remove it, or give another TARGET")
  values = load(source)
  if not isinstance(values, Mapping):
    raise ValueError(f"{source} holds no dictionary of tensors, but {type(values).__name__!r:.80}")
  tensors, others = flatten(values)
  if not tensors:
    raise ValueError(f"{source} holds no tensor of floating-point numbers")
  tensor_file.write(
    target,
    {
      name: (np.dtype(np.float32), tuple(tensor.shape), lambda tensor=tensor: to_numpy(tensor))
      for name, tensor in tensors.items()
    },
    {},
  )
  left = f", without {len(others)} others such as {others[0]!r:.80}" if others else ""
  print(f"wrote {len(tensors)} tensors to {target}{left}")


def load(path: str) -> Any:
  """Returns what a PyTorch file holds, on the CPU, if it is tensors and plain values alone.

  Raises:
    FileNotFoundError: no such file.
    MissingPackageError: PyTorch is not installed.
    ValueError: a file that is damaged or holds anything else.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f"no such file: {path}")
  torch = extras.require("torch", "eval", path)
  try:
    return torch.load(path, map_location="cpu", weights_only=True)
  except Exception as e:  # whatever a damaged or foreign file makes of PyTorch
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise ValueError(f"{path} is not a whole PyTorch file of tensors alone ({reason:.200})") from None


def flatten(values: Mapping) -> tuple[dict[str, Any], list[str]]:
  """Returns {name: tensor} of the floating-point tensors in nested dictionaries, and the names of all other values."""
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
  sole = len(inner) == 1 and not any(hasattr(value, "is_floating_point") for value in values.values())
  if sole:
    return flatten(inner[0])
  visit("", values)
  return tensors, others


def to_numpy(tensor: Any) -> np.ndarray:
  """Returns a PyTorch tensor as float32, whatever its type, memory and gradient."""
  return tensor.detach().float().numpy()


if __name__ == "__main__":
  cli.run(main, ("SOURCE", "TARGET"))
