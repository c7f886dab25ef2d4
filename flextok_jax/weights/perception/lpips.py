"""Weights of LPIPS from local files with the names of torchvision and of the lpips package."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models.perception.lpips import LPIPS
from flextok_jax.weights.layout import Entry, shapes_of
from flextok_jax.weights.perception import files

_UNUSED = ("classifier.", "lins.", "scaling_layer.")  # of torchvision's classifiers and of whole lpips modules


def load_lpips(backbone: str | os.PathLike, heads: str | os.PathLike | None = None) -> tuple[str, dict]:
  """Loads the weights of LPIPS.

  Args:
    backbone: a .safetensors or .npz file with torchvision's names: its ImageNet classifier alexnet or vgg16, converted
      by python -m flextok_jax.convert.
    heads: the lpips package's weights/v0.1/alex.pth or vgg.pth, likewise converted; None: the first file has both, with
      the names of lpips.LPIPS(...).state_dict().

  Returns:
    (net, params): "alex" or "vgg", and the float32 parameters of LPIPS(net).

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged or foreign file; the line names what is wrong.
  """
  path = os.fspath(backbone)
  tensors = {re.sub(r"^net\.slice\d\.", "features.", name): x for name, x in files.read(path, _UNUSED).items()}
  if heads is not None:
    path = f"{path} with {os.fspath(heads)}"
    tensors |= files.read(heads, _UNUSED)
  first = tensors.get("features.0.weight", np.empty(0)).shape
  net = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}.get(first)
  if net is None:
    raise ValueError(f"{path} is neither AlexNet's nor VGG16's: features.0.weight has shape {list(first)}")
  image = jnp.zeros((1, 32, 32, 3))
  shapes = shapes_of(jax.eval_shape(LPIPS(net).init, jax.random.key(0), image, image)["params"])
  return net, files.fill(path, tensors, (_entry(name, shape) for name, shape in shapes.items()))


def _entry(path: str, shape: tuple[int, ...]) -> Entry:
  if path.startswith("head_"):
    return Entry(path, shape, (f"lin{path.removeprefix('head_')}.model.1.weight",), "c -> 1 c 1 1")
  module, kind = path.split("/")[1:]  # of "features/conv_INDEX/kernel"
  index = module.removeprefix("conv_")
  layout = "h w i o -> o i h w" if kind == "kernel" else "o -> o"
  return Entry(path, shape, (f"features.{index}.{'weight' if kind == 'kernel' else 'bias'}",), layout)
