"""Saving weights: in our format, as the authors' PyTorch code reads a tokenizer, as diffusers reads an autoencoder."""

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
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.weights import layout
from flextok_jax.weights.loading import CONFIG_KEY, WEIGHTS
from flextok_jax.weights.official import diffusers, tokenizer_names
from flextok_jax.weights.official.writer import to_official


def save_weights(
  path: str | os.PathLike,
  config: ConfigDict,
  params: Mapping,
  dtype: str | None = None,
  extra: Mapping[str, str] | None = None,
):
  """Writes parameters and their config as one safetensors file in our format, atomically.

  Args:
    path: of the file.
    config: of the model.
    params: its parameters.
    dtype: of all arrays; None: each keeps its own.
    extra: further entries of the file's metadata.
  """
  flat = flatten_dict(unbox(params), sep="/")
  entries = (layout.identity_entry(k, v.shape) for k, v in flat.items())
  metadata = {"format": "flextok_jax", CONFIG_KEY: config.to_json(), **(extra or {})}
  tensor_file.write(path, _tensors(entries, flat, dtype), metadata, checksum=True)


def save_folder(folder: str | os.PathLike, config: ConfigDict, params: Mapping):
  """Writes a folder that `load` reads: weights.safetensors, and config.json for people to read."""
  folder = _check_folder(folder)
  save_weights(folder / WEIGHTS, config, params)
  files.write_file(folder / hub.CONFIG, (config.to_json(indent=1) + "\n").encode())


def save_official(path: str | os.PathLike, config: ConfigDict, params: Mapping):
  """Writes a tokenizer in the authors' format, or an autoencoder in diffusers' format.

  A tokenizer: a .safetensors file with the configuration in its metadata, or a folder in the hub's layout
  (model.safetensors, config.json). An autoencoder: a folder of config.json and diffusion_pytorch_model.safetensors.

  Raises:
    ValueError: the format does not support this model; the line names the field.
  """
  flat = flatten_dict(unbox(params), sep="/")
  shapes = layout.shapes_of(flat)
  if config.stage == "vae":
    if os.fspath(path).endswith(".safetensors"):
      raise ValueError(f"diffusers keeps an autoencoder in a folder, with its config.json: give a folder, not {path}")
    official = diffusers.to_diffusers(config.vae, config.image_size)
    tensors = _tensors((diffusers.entry(name, shape) for name, shape in shapes.items()), flat)
    weights = hub.WEIGHTS[1]
  else:
    official = to_official(config)
    roles = tokenizer_names.DEFAULT_ROLES
    tensors = _tensors(tokenizer_names.entries(shapes, roles), flat)
    tensors |= tokenizer_names.fixed_tables(make_model(config), roles)
    weights = hub.WEIGHTS[0]
  if os.fspath(path).endswith(".safetensors"):
    tensor_file.write(path, tensors, {k: str(v) for k, v in official.items()})
    return
  folder = _check_folder(path)
  tensor_file.write(folder / weights, tensors, {"format": "pt"})
  text = json.dumps({k: v for k, v in official.items() if k != "_target_"}, indent=2)
  files.write_file(folder / hub.CONFIG, (text + "\n").encode())


def _check_folder(path: str | os.PathLike) -> Path:
  path = Path(path)
  if path.exists() and not path.is_dir():
    raise ValueError(f"{path} is a file: give a folder")
  return path


def _tensors(entries: Iterable[layout.Entry], flat: Mapping[str, jax.Array], dtype: str | None = None) -> dict:
  """Returns the argument of tensor_file.write; each tensor is fetched from its device when it is written."""
  tensors = {}
  for e in entries:
    array, shape = flat[e.path], e.official_shape
    for i, name in enumerate(e.names):
      make = lambda e=e, i=i, array=array: e.to_official(np.asarray(array), i)
      tensors[name] = np.dtype(dtype or array.dtype), shape, make
  return tensors
