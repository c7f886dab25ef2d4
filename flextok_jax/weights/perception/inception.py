"""Weights of the FID's InceptionV3 from local files with the names of pytorch-fid and torch-fidelity."""

from collections.abc import Mapping
import os

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models.perception import inception
from flextok_jax.weights.layout import Entry, shapes_of
from flextok_jax.weights.perception import files

_NORM = ("weight", "bias", "running_mean", "running_var")  # of a BatchNorm
_EPSILON = 1e-3


def load_inception(path: str | os.PathLike) -> dict:
  """Loads the float32 parameters of FIDInception, with BatchNorms folded into the convolutions.

  Args:
    path: a .safetensors or .npz file with the tensors of pt_inception-2015-12-05-6726825d.pth (of pytorch-fid; the
      same tensors as torch-fidelity's weights-inception-2015-12-05-6726825d.pth), converted by
      python -m flextok_jax.convert.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged or foreign file; the line names what is wrong.
  """
  counts = tuple(f"{name}.bn.num_batches_tracked" for name in _modules(parameter_shapes()).values())  # whole numbers
  return from_official(path, files.read(path, counts))


def from_official(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> dict:
  """Returns the parameters made of {official name: tensor}; `path` is for errors."""
  shapes = parameter_shapes()
  modules = _modules(shapes)
  entries = [Entry("fc/kernel", shapes["fc/kernel"], ("fc.weight",), "i o -> o i")]
  for module, name in modules.items():
    entries.append(
      Entry(f"{module}/kernel", shapes[f"{module}/kernel"], (f"{name}.conv.weight",), "h w i o -> o i h w")
    )
    entries += [Entry(f"{module}/{kind}", shapes[f"{module}/bias"], (f"{name}.bn.{kind}",), "o -> o") for kind in _NORM]
  found = flatten_dict(files.fill(path, tensors, entries, allowed=["fc.bias"]), sep="/")
  params = {"fc/kernel": found["fc/kernel"]}
  for module in modules:
    weight, bias, mean, variance = (found[f"{module}/{kind}"].astype(np.float64) for kind in _NORM)
    scale = weight / np.sqrt(variance + _EPSILON)
    params[f"{module}/kernel"] = (found[f"{module}/kernel"] * scale).astype(np.float32)
    params[f"{module}/bias"] = (bias - mean * scale).astype(np.float32)
  return unflatten_dict(params, sep="/")


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
  """Returns {our path: official name} of the convolutions."""
  paths = (path.removesuffix("/bias") for path in shapes if path.endswith("/bias"))
  return {path: path.replace("/", ".") for path in paths}


def parameter_shapes() -> dict[str, tuple[int, ...]]:
  """Returns {path: shape} of FIDInception's parameters."""
  image = jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
  return shapes_of(jax.eval_shape(inception.FIDInception().init, jax.random.key(0), image)["params"])
