"""Which tokenizer wrote a token id: a short hash of all that decides it."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json

from flax.core.meta import unbox
import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.stages.tokenizer import make_model

_HOW = ("dtype", "remat", "attention", "parent", "name")  # fields of a module that say how, not what it computes


def fingerprint(config: ConfigDict, params: Mapping) -> str:
  """Returns the tokenizer's fingerprint, 16 hex digits of a SHA-256.

  It covers image size, FSQ levels, scaling factor, and settings and arrays of the encoder and of the VAE's encoder; the
  decoders have no influence. Arrays count as rounded to bfloat16: the same weights in float32 and bfloat16 agree.

  Args:
    params: the joined tree of stage "tokenizer".

  Raises:
    ValueError: a model without tokens.
  """
  if config.stage != "tokenizer":
    raise ValueError(f"a model of stage {config.stage!r} has no tokens, so no fingerprint of a tokenizer")
  model, params = make_model(config), unbox(params)
  parts = {"encoder": params["encoder"]}
  if model.vae is not None:
    parts["vae"] = {name: params["vae"][name] for name in ("encoder", "quant_conv")}
  settings = {
    "image_size": config.image_size,
    "levels": list(model.levels),
    "scaling_factor": float(model.scaling_factor),
    "encoder": _settings(model.encoder),
    "vae": model.vae and _settings(model.vae),
  }
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  for path, array in sorted(flatten_dict(parts, sep="/").items()):
    array = np.ascontiguousarray(np.asarray(array).astype(jnp.bfloat16))
    digest.update(f"\n{path} {list(array.shape)}\n".encode())
    digest.update(array.view(np.uint16).astype("<u2").tobytes())
  return digest.hexdigest()[:16]


def _settings(module: nn.Module) -> dict:
  """The fields that are not at their default: a field that comes later leaves old fingerprints as they are."""
  fields = [field for field in dataclasses.fields(module) if field.name not in _HOW]
  values = {field.name: getattr(module, field.name) for field in fields}
  values = {field.name: values[field.name] for field in fields if values[field.name] != field.default}
  return {name: _plain(value) for name, value in values.items()}


def _plain(value):
  """Whole numbers as floats and tuples as lists: 4 and 4.0 are the same setting."""
  if isinstance(value, str | bool | None):
    return value
  return float(value) if isinstance(value, int | float) else [_plain(v) for v in value]
