"""Fingerprints of tokenizers, VAEs and teachers: hashes of everything that affects what they compute."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from flextok_jax.config import TOKENIZER_STAGES
from flextok_jax.core.hashing import hash_tree
from flextok_jax.stages.tokenizer import make_model

# Fields of a module that affect how it computes, not what.
_IMPLEMENTATION = ("dtype", "remat", "attention", "parent", "name")
_VAE_SETTINGS = ("latent_channels", "block_out_channels", "layers_per_block", "norm_groups")
_VAE_PARTS = ("encoder", "quant_conv")


def tokenizer(config: ConfigDict, params: Mapping, *, decoder: bool = False) -> str:
  """Returns the fingerprint of a tokenizer, which identifies its token ids.

  It covers image size, FSQ levels, scaling factor, and settings and arrays of the encoder and of the VAE's encoder. The
  decoders have no effect on token ids and are left out. All processes call it together.

  Args:
    config: of the tokenizer.
    params: the whole parameter tree.
    decoder: whether it also covers the decoder and its sampler, of a student those of its teacher: it then identifies
      the paths from noise to latents.

  Raises:
    ValueError: the model is not a tokenizer.
  """
  if config.stage not in TOKENIZER_STAGES:
    raise ValueError(f"a model of stage {config.stage!r} has no tokens, so no fingerprint of a tokenizer")
  model = make_model(config)
  arrays = {"encoder": params["encoder"]}
  if model.vae is not None:
    arrays["vae"] = {name: params["vae"][name] for name in _VAE_PARTS}
  settings = {
    "image_size": config.image_size,
    "levels": list(model.levels),
    "scaling_factor": float(model.scaling_factor),
    "encoder": _changed_fields(model.encoder),
    "vae": _changed_fields(model.vae),
  }
  if decoder:
    sampler = config.distill.sampler if config.stage == "distill" else config.sampler
    settings["decoder"] = _changed_fields(model.decoder.clone(interval=False))
    settings["sampler"] = {name: _jsonable(value) for name, value in sampler.items()}
    if model.base_side:
      settings["base_side"] = model.base_side
    arrays["decoder"] = params["decoder"]
  return hash_tree(settings, arrays)


def vae(config: ConfigDict, params: Mapping) -> str:
  """Returns the fingerprint of a VAE, which identifies its latents. All processes call it together.

  It covers sizes and arrays of the VAE's encoder. Its decoder and the scaling factor have no effect on the stored
  latents and are left out.

  Args:
    config: of any stage with a VAE.
    params: a tree with {"vae": ...}.
  """
  settings = {name: config.vae[name] for name in _VAE_SETTINGS}
  return hash_tree(settings, {name: params["vae"][name] for name in _VAE_PARTS})


def teacher(sizes: Mapping[str, Any], params: Mapping) -> str:
  """Returns the fingerprint of a REPA teacher: sizes and parameters as load_vit returns them."""
  return hash_tree(sizes, params)


def _changed_fields(module: nn.Module | None) -> dict[str, Any] | None:
  """Returns the fields that differ from their default; so new fields do not change existing fingerprints."""
  if module is None:
    return None
  fields = {f.name: f.default for f in dataclasses.fields(module) if f.name not in _IMPLEMENTATION}
  values = {name: (getattr(module, name), default) for name, default in fields.items()}
  return {name: _jsonable(value) for name, (value, default) in values.items() if value != default}


def _jsonable(value: Any) -> Any:
  """Returns a field's value with numbers as floats and tuples as lists: 4 and 4.0 are the same setting."""
  if isinstance(value, str | bool | None):
    return value
  return float(value) if isinstance(value, int | float) else [_jsonable(v) for v in value]
