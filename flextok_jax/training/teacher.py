"""The frozen teacher of REPA, a DINOv2: features of the patches of images, and which teacher made them."""

from collections.abc import Callable, Mapping
import os

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.config import float_dtype
from flextok_jax.core.images import to_float
from flextok_jax.data.shards.features import FeatureShards
from flextok_jax.models.perception.vit import ViT, preprocess
from flextok_jax.parallel import sharding
from flextok_jax.stages import repa
from flextok_jax.weights import fingerprints
from flextok_jax.weights.perception.vit import load_vit

_HELP = (
  "REPA needs its teacher: give --config.repa.teacher=DIR, a folder with config.json and model.safetensors of a "
  "DINOv2 (of https://huggingface.co/facebook/dinov2-large, say), or train without it: --config.repa.weight=0"
)


def read(config: ConfigDict) -> tuple[dict, dict]:
  """Returns (sizes, params) of the teacher at config.repa.teacher, as load_vit, without a head.

  Raises:
    FileNotFoundError, ValueError: there is none, or its width is not config.repa.features.
  """
  try:
    sizes, params = load_vit(config.repa.teacher)
  except FileNotFoundError as e:
    raise FileNotFoundError(f"{_HELP} ({e})") from None
  sizes.pop("num_classes", None)
  params.pop("head", None)
  if sizes["width"] != config.repa.features:
    raise ValueError(
      f"config.repa.features={config.repa.features}, but the teacher {config.repa.teacher} gives "
      f"{sizes['width']}: pass --config.repa.features={sizes['width']}"
    )
  return sizes, params


def make_features_fn(
  config: ConfigDict, sizes: Mapping, params: Mapping, mesh: jax.sharding.Mesh
) -> Callable[[jax.Array], jax.Array]:
  """Returns a jitted function of images uint8 [b, h, w, 3] that gives features [b, g * g, d], row by row.

  Images are resized to g patches a side (repa.teacher_grid). The parameters are put on the mesh by their logical axes
  in config.repa.dtype, which is that of the products and of the features, too.
  """
  dtype = float_dtype("repa.dtype", config.repa.dtype)
  vit = ViT(**sizes, dtype=dtype, attention=config.attention)
  side = repa.teacher_grid(config) * vit.patch_size
  boxed = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
  put = lambda x, place: sharding.place(np.asarray(x).astype(dtype), place)
  placed = jax.tree.map(put, dict(params), sharding.tree_shardings(boxed, mesh))

  def features(params, images):
    images = preprocess((to_float(images) + 1) / 2, side, side)
    return vit.apply({"params": params}, images)["patches"]

  features = jax.jit(features, out_shardings=sharding.batch_sharding(mesh))
  return lambda images: features(placed, images)


def make_teach(config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable[[dict], dict]:
  """Returns a function of a training batch that adds the teacher's features of its images, "teacher" [b, g * g, d].

  It computes outside of the update: neither state nor checkpoints hold the teacher. Where REPA is off, or the features
  come with the batch (config.data.teacher), batches stay as they are.

  Raises:
    FileNotFoundError, ValueError: as read, or features that are nowhere to be had.
  """
  if repa.section(config) is None:
    return lambda batch: batch
  check_source(config)
  if config.data.teacher:
    _check_shards(config)
    return lambda batch: batch
  features = make_features_fn(config, *read(config), mesh)
  return lambda batch: batch | {"teacher": features(batch["image"])}


def _check_shards(config: ConfigDict):
  """Raises ValueError where the features in config.data.teacher are of another teacher than the one that is here."""
  there = FeatureShards(config.data.teacher).meta["fingerprint"]
  if not os.path.exists(config.repa.teacher):  # its features are all that training needs of it
    return
  here = fingerprints.teacher(*read(config))
  if here != there:
    raise ValueError(
      f"the teacher shards are of teacher {there}, but {config.repa.teacher} is {here}: write features "
      "with that one (python -m flextok_jax.tokenize --what=dino), or use the one that wrote these"
    )


def check_source(config: ConfigDict):
  """Raises ValueError where config, of REPA, does not say whence the teacher's features come."""
  latents, teacher = config.data.latents, config.data.teacher
  if latents and not teacher:
    raise ValueError(
      "with config.data.latents there are no images for REPA's teacher to look at: write its features of the same "
      "images (python -m flextok_jax.tokenize --what=dino) and give --config.data.teacher=DIR, or "
      "--config.repa.weight=0"
    )
  if teacher and not latents:
    raise ValueError(
      "config.data.teacher goes with config.data.latents, of the same crops: fresh images have features of their "
      "own, which the step computes with --config.data.teacher=''"
    )
