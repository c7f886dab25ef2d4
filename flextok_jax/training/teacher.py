"""The frozen teacher of REPA, a DINOv2: features of the patches of images."""

from collections.abc import Callable, Mapping
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core.images import to_float
from flextok_jax.data.shards.features import FeatureShards
from flextok_jax.models.perception.vit import ViT, preprocess
from flextok_jax.ops.repa import scaled_grid
from flextok_jax.parallel import sharding
from flextok_jax.weights import fingerprints
from flextok_jax.weights.perception.vit import load_vit

_HELP = (
  "REPA needs its teacher: set repa.teacher to a folder with config.json and model.safetensors of a DINOv2 (such as "
  "https://huggingface.co/facebook/dinov2-large), or train without it: repa.weight=0"
)


def read_teacher(path: str, width: int) -> tuple[dict[str, Any], dict]:
  """Returns (sizes, params) of the teacher at path as load_vit does, without a head.

  Args:
    path: folder of a DINOv2.
    width: expected width of its features.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it cannot be read or has another width.
  """
  try:
    sizes, params = load_vit(path)
  except FileNotFoundError as e:
    raise FileNotFoundError(f"{_HELP} ({e})") from None
  sizes.pop("num_classes", None)
  params.pop("head", None)
  if sizes["width"] != width:
    raise ValueError(
      f"repa.features={width}, but the features of the teacher {path} have {sizes['width']}: "
      f"set repa.features={sizes['width']}"
    )
  return sizes, params


def make_features_fn(
  sizes: Mapping[str, Any],
  params: Mapping,
  mesh: jax.sharding.Mesh,
  *,
  grid: int,
  dtype: jnp.dtype | str,
  image_size: int | None = None,
  attention: str = "auto",
) -> Callable[[jax.Array], jax.Array]:
  """Returns a jitted function from images uint8 [b, h, w, 3] to features [b, n, d], row by row.

  Args:
    sizes: fields of the ViT.
    params: its parameters, which are placed on the mesh by their logical axes in `dtype`.
    mesh: of devices.
    grid: patches per side; images are resized to it.
    dtype: of the products and of the features.
    image_size: pixels per side of the images that have this grid; those of other shapes have one in proportion. None:
      all have it.
    attention: one of ops.attention.IMPLEMENTATIONS.
  """
  dtype = jnp.dtype(dtype)
  vit = ViT(**sizes, dtype=dtype, attention=attention)
  side = grid * vit.patch_size
  boxed = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
  put = lambda x, place: sharding.place(np.asarray(x).astype(dtype), place)
  placed = jax.tree.map(put, dict(params), sharding.tree_shardings(boxed, mesh))

  def features(params, images):
    shape = images.shape[1:3]
    rows, columns = (grid, grid) if image_size is None else scaled_grid(grid, image_size, shape)
    images = preprocess((to_float(images) + 1) / 2, rows * vit.patch_size, columns * vit.patch_size)
    return vit.apply({"params": params}, images)["patches"]

  compiled = jax.jit(features, out_shardings=sharding.batch_sharding(mesh))
  return lambda images: compiled(placed, images)


def check_shards(shards: str, path: str, width: int) -> None:
  """Raises ValueError if the features in the folder `shards` are not of the teacher at path, if that exists."""
  expected = FeatureShards(shards).meta["fingerprint"]
  if not os.path.exists(path):  # training needs only the features
    return
  found = fingerprints.teacher(*read_teacher(path, width))
  if found != expected:
    raise ValueError(
      f"the teacher shards are of teacher {expected}, but {path} is {found}: write features with that one "
      "(python -m flextok_jax.tokenize --what=dino), or use the one that wrote these"
    )


def check_source(latents: str, shards: str) -> None:
  """Raises ValueError if the teacher's features have no source, or one of other images.

  Args:
    latents: folder of latent shards, "" if training reads images.
    shards: folder of the teacher's features, "" if the teacher computes them from the images.
  """
  if latents and not shards:
    raise ValueError(
      "with data.latents there are no images for REPA's teacher: write its features of the same images "
      "(python -m flextok_jax.tokenize --what=dino) and set data.teacher to their folder, or set repa.weight=0"
    )
  if shards and not latents:
    raise ValueError(
      "data.teacher goes with data.latents of the same crops: with new images the teacher computes their features in "
      "the step, set data.teacher=''"
    )
