"""Weights to files: ours, the authors' (read by their PyTorch code), and diffusers' for an autoencoder."""

from collections.abc import Iterable, Mapping
import json
import os
from pathlib import Path

from flax.core.meta import unbox
from flax.traverse_util import flatten_dict
import jax
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.core import files, hub, tensor_file
from flextok_jax.weights import names
from flextok_jax.weights.loading import CONFIG_KEY, WEIGHTS, fixed_tables
from flextok_jax.weights.official import diffusers as diffusers_config
from flextok_jax.weights.official import tokenizer as official_config


def save_weights(
  path: str | os.PathLike,
  config: ConfigDict,
  params: Mapping,
  dtype: str | None = None,
  extra: Mapping[str, str] | None = None,
):
  """Writes parameters and their config as one safetensors file of ours, atomically.

  Args:
    dtype: of all arrays; None keeps each as it is.
    extra: further entries of the file's metadata.
  """
  flat = _flat(params)
  tensors = _tensors((names.own_entry(k, v.shape) for k, v in flat.items()), flat, dtype)
  metadata = {"format": "flextok_jax", CONFIG_KEY: config.to_json(), **(extra or {})}
  tensor_file.write(path, tensors, metadata)


def save_folder(folder: str | os.PathLike, config: ConfigDict, params: Mapping):
  """Writes a folder that `load` reads: weights.safetensors and, for people, config.json."""
  folder = _folder(folder)
  save_weights(folder / WEIGHTS, config, params)
  files.write_file(folder / hub.CONFIG, (config.to_json(indent=1) + "\n").encode())


def save_official(path: str | os.PathLike, config: ConfigDict, params: Mapping):
  """Writes a tokenizer as the authors do, or an autoencoder as diffusers does.

  A tokenizer: a .safetensors file with the configuration in its metadata, or a folder in the hub's layout
  (model.safetensors, config.json). An autoencoder: a folder of config.json and diffusion_pytorch_model.safetensors.

  Raises:
    ValueError: the format has no words for this model, naming the field.
  """
  flat = _flat(params)
  shapes = {k: v.shape for k, v in flat.items()}
  if config.stage == "vae":
    if os.fspath(path).endswith(".safetensors"):
      raise ValueError(f"diffusers keeps an autoencoder in a folder, with its config.json: give a folder, not {path}")
    official = diffusers_config.to_diffusers(config.vae, config.image_size)
    tensors = _tensors(names.entries(shapes, {}, vae_prefix=""), flat)
    weights = hub.WEIGHTS[1]
  else:
    official = official_config.to_official(config)
    roles = official_config.DEFAULT_ROLES
    tensors = _tensors(names.entries(shapes, roles), flat)
    for name, table in fixed_tables(config, roles):
      tensors[name] = table.dtype, table.shape, lambda table=table: table
    weights = hub.WEIGHTS[0]
  if os.fspath(path).endswith(".safetensors"):
    tensor_file.write(path, tensors, {k: str(v) for k, v in official.items()})
    return
  folder = _folder(path)
  tensor_file.write(folder / weights, tensors, {"format": "pt"})
  text = json.dumps({k: v for k, v in official.items() if k != "_target_"}, indent=2)
  files.write_file(folder / hub.CONFIG, (text + "\n").encode())


def _flat(params: Mapping) -> dict[str, jax.Array]:
  return flatten_dict(unbox(params), sep="/")


def _folder(path: str | os.PathLike) -> Path:
  path = Path(path)
  if path.exists() and not path.is_dir():
    raise ValueError(f"{path} is a file: give a folder")
  return path


def _tensors(entries: Iterable[names.Entry], flat: Mapping[str, jax.Array], dtype: str | None = None) -> dict:
  """Returns what tensor_file.write takes; every tensor is fetched when its turn comes."""
  tensors = {}
  for e in entries:
    array, shape = flat[e.path], e.official_shape
    for i, name in enumerate(e.names):
      make = lambda e=e, i=i, array=array: e.to_official(np.asarray(array), i)
      tensors[name] = np.dtype(dtype or array.dtype), shape, make
  return tensors
