"""Names and layouts of official checkpoints beside ours, both ways; and the golden set's tiny model."""

from collections.abc import Iterator
from pathlib import Path
import re
from typing import Any

from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
import numpy as np
from safetensors.numpy import load_file

from configs import common

HEAD_DIM = 64
FIXED_TABLES = {  # stored by official checkpoints, computed by us
  "encoder.module_dict.enc_patches_posemb_module.posembs",
  "decoder.module_dict.dec_patches_posemb_module.posembs",
}

# Ours: official, for linear layers (kernel [in, out], bias).
LINEAR = {
  "encoder/patch_embed": "encoder.module_dict.enc_patch_emb.patch_proj",
  "encoder/head": "encoder.module_dict.enc_to_latents.proj",
  "decoder/code_embed": "decoder.module_dict.dec_from_latents.proj",
  "decoder/patch_embed": "decoder.module_dict.dec_noise_patch_emb.patch_proj",
  "decoder/time_embed/in": "decoder.module_dict.dec_time_embedder.mlp.0",
  "decoder/time_embed/out": "decoder.module_dict.dec_time_embedder.mlp.2",
  "decoder/head_modulation": "decoder.module_dict.dec_to_patches.adaLN_modulation.1",
  "decoder/head": "decoder.module_dict.dec_to_patches.proj",
}
# Ours: (official, official layout -> ours).
TOKENS = {
  "encoder/registers": ("encoder.module_dict.enc_register_module.registers", "n d -> n d"),
  "decoder/register_positions": ("decoder.module_dict.dec_registers_posemb_module.posembs", "1 1 d n -> n d"),
  "decoder/mask_token": ("decoder.module_dict.dec_nested_dropout.dropout_mask_token", "d -> d"),
  "decoder/null_token": ("decoder.module_dict.dec_latent_dropout.nullcond", "d -> d"),
}
# Ours in a stack of blocks: (n official names in every one of l blocks, official layout -> ours).
BLOCK = {
  "attention/qkv/kernel": (("attn.wq", "attn.wk", "attn.wv"), "l n (h e) d -> l d n h e"),
  "attention/out/kernel": (("attn.proj",), "l 1 d (h e) -> l h e d"),
  "mlp/in/kernel": (("mlp.fc1", "mlp.fc3"), "l n f d -> l d n f"),
  "mlp/out/kernel": (("mlp.fc2",), "l 1 d f -> l f d"),
  "modulation/kernel": (("adaLN_modulation.1",), "l 1 o d -> l d o"),
  "modulation/bias": (("adaLN_modulation.1",), "l 1 o -> l o"),
}
VAE = (  # regular expressions on our path, applied in turn
  (r"^vae", "vae.vae"),
  (r"/(kernel|scale)$", "/weight"),
  (r"(down|up)_(\d+)", r"\1_blocks.\2"),
  (r"/mid/", "/mid_block/"),
  (r"resnet_(\d)", r"resnets.\1"),
  (r"attention", "attentions.0"),
  (r"to_out", "to_out.0"),
  (r"(down|up)sample/", r"\1samplers.0.conv/"),
  ("/", "."),
)


def entries(params: dict) -> Iterator[tuple[str, Any, list[str], tuple[int, ...], str]]:
  """Yields path, leaf, official names, shape [l, n] in which they stack (or ()), einops pattern official -> ours."""
  for path, leaf in flatten_dict(params, sep="/").items():
    module, _, kind = path.rpartition("/")
    stack, _, part = path.partition("/transformer/blocks/")
    if path.startswith("vae/"):
      name = path
      for pattern, replacement in VAE:
        name = re.sub(pattern, replacement, name)
      layout = {1: "o -> o", 2: "o i -> i o", 4: "o i h w -> h w i o"}[leaf.ndim]
      yield path, leaf, [name], (), layout
    elif part:
      parts, layout = BLOCK[part]
      suffix = "bias" if kind == "bias" else "weight"
      names = [
        f"{stack}.module_dict.{stack[:3]}_transformer.blocks.{i}.{name}.{suffix}"
        for i in range(leaf.shape[0])
        for name in parts
      ]
      yield path, leaf, names, (leaf.shape[0], len(parts)), layout
    elif module in LINEAR:
      suffix, layout = ("bias", "o -> o") if kind == "bias" else ("weight", "o i -> i o")
      yield path, leaf, [f"{LINEAR[module]}.{suffix}"], (), layout
    else:
      name, layout = TOKENS[path]
      yield path, leaf, [name], (), layout


def to_official(params: dict) -> dict[str, np.ndarray]:
  """Returns our tree {"vae", "encoder", "decoder"} (any of them) as a flat dict in official names and layouts."""
  weights = {}
  for _, leaf, names, stack, layout in entries(params):
    layout = " -> ".join(reversed(layout.split(" -> ")))
    value = rearrange(np.asarray(leaf), layout)
    weights.update(zip(names, value.reshape(-1, *value.shape[len(stack) :]) if stack else [value]))
  return weights


def from_official(weights: dict[str, np.ndarray], template: dict) -> dict:
  """Returns official weights as a tree like template, whose leaves need only a shape; every weight must be used."""
  flat, used = {}, set(FIXED_TABLES)
  for path, leaf, names, stack, layout in entries(template):
    value = np.stack([weights[name] for name in names])
    value = value.reshape(*stack, *value.shape[1:]) if stack else value[0]
    flat[path] = rearrange(value, layout, **({"e": HEAD_DIM} if "e)" in layout else {}))
    assert flat[path].shape == leaf.shape, (path, flat[path].shape, leaf.shape)
    used.update(names)
  assert not set(weights) - used, f"weights without a place: {sorted(set(weights) - used)}"
  return unflatten_dict(flat, sep="/")


def load_official(path: Path, template: dict) -> dict:
  """Returns the parameters of an official checkpoint file as a tree like template."""
  return from_official(load_file(path), template)


def tiny_config() -> ConfigDict:
  """Returns the configuration of the golden set's tiny model."""
  return common.derive(
    image_size=64,
    dtype="float32",
    vae=dict(
      latent_channels=16, block_out_channels=(8, 16, 16, 24), norm_groups=4, scaling_factor=0.18, sample_posterior=False
    ),
    encoder=dict(width=128, depth=2),
    decoder=dict(width=192, depth=2),
    tokens=dict(num_registers=16),
  )
