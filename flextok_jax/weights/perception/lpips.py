"""Weights of LPIPS from local files, in the names of torchvision and of the lpips package."""

import os
import re

import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models.perception.lpips import LPIPS
from flextok_jax.weights.names import Entry
from flextok_jax.weights.perception import files as network_files

_UNUSED = ("classifier.", "lins.", "scaling_layer.")  # of torchvision's classifiers and of whole lpips modules


def load_lpips(backbone: str | os.PathLike, heads: str | os.PathLike | None = None) -> tuple[str, dict]:
  """Loads the weights of an LPIPS.

  Args:
    backbone: torchvision's alexnet or vgg16, the ImageNet classifiers, written anew by python -m
      flextok_jax.convert_torch: a .safetensors or .npz file with torchvision's names.
    heads: so the lpips package's weights/v0.1/alex.pth or vgg.pth; None: the first file has both, in the names of
      lpips.LPIPS(...).state_dict().

  Returns:
    (net, params): models/perception/lpips.py's LPIPS(net) and its parameters, float32.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged or foreign file; the line names what is wrong.
  """
  path = os.fspath(backbone)
  tensors = {re.sub(r"^net\.slice\d\.", "features.", name): x for name, x in network_files.read(path, _UNUSED).items()}
  if heads is not None:
    path = f"{path} with {os.fspath(heads)}"
    tensors |= network_files.read(heads, _UNUSED)
  first = tensors.get("features.0.weight", np.empty(0)).shape
  net = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}.get(first)
  if net is None:
    raise ValueError(f"{path} is neither AlexNet's nor VGG16's: features.0.weight has shape {list(first)}")
  image = jnp.zeros((1, 32, 32, 3))
  shapes = nn.unbox(jax.eval_shape(LPIPS(net).init, jax.random.key(0), image, image)["params"])
  entries = (_entry(name, x.shape) for name, x in flatten_dict(shapes, sep="/").items())
  return net, network_files.fill(path, tensors, entries)


def _entry(path: str, shape: tuple[int, ...]) -> Entry:
  if path.startswith("head_"):
    return Entry(path, shape, (f"lin{path.removeprefix('head_')}.model.1.weight",), "c -> 1 c 1 1")
  index, kind = re.fullmatch(r"features/conv_(\d+)/(kernel|bias)", path).groups()
  layout = "h w i o -> o i h w" if kind == "kernel" else "o -> o"
  return Entry(path, shape, (f"features.{index}.{'weight' if kind == 'kernel' else 'bias'}",), layout)
