"""Parameter names and layouts in official tokenizers' files."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import re

import numpy as np

from flextok_jax.models.tokenizer.flextok import FlexTok
from flextok_jax.ops import posemb
from flextok_jax.weights.layout import Entry, Shape, block_entry
from flextok_jax.weights.official import diffusers

# Our module -> full name of the official module in the files we write, which is the prefix of its tensors.
DEFAULT_ROLES = {
  "encoder/patch_embed": "encoder.module_dict.enc_patch_emb",
  "encoder/positions": "encoder.module_dict.enc_patches_posemb_module",
  "encoder/registers": "encoder.module_dict.enc_register_module",
  "encoder/transformer": "encoder.module_dict.enc_transformer",
  "encoder/head": "encoder.module_dict.enc_to_latents",
  "decoder/code_embed": "decoder.module_dict.dec_from_latents",
  "decoder/register_positions": "decoder.module_dict.dec_registers_posemb_module",
  "decoder/nested_dropout": "decoder.module_dict.dec_nested_dropout",
  "decoder/null_condition": "decoder.module_dict.dec_latent_dropout",
  "decoder/patch_embed": "decoder.module_dict.dec_noise_patch_emb",
  "decoder/positions": "decoder.module_dict.dec_patches_posemb_module",
  "decoder/time_embed": "decoder.module_dict.dec_time_embedder",
  "decoder/transformer": "decoder.module_dict.dec_transformer",
  "decoder/head": "decoder.module_dict.dec_to_patches",
}
VAE_PREFIX = "vae.vae."

_LINEAR = {"kernel": ("weight", "i o -> o i"), "bias": ("bias", "o -> o")}
_INNER = {  # our linear module: official name after that of its role
  "encoder/patch_embed": ".patch_proj",
  "encoder/head": ".proj",
  "decoder/code_embed": ".proj",
  "decoder/patch_embed": ".patch_proj",
  "decoder/head": ".proj",
}
_TABLES = {  # our array: (role, name in the official module, layout)
  "encoder/registers": ("encoder/registers", "registers", "n d -> n d"),
  "encoder/positions": ("encoder/positions", "posembs", "a n d -> a 1 d n"),
  "decoder/positions": ("decoder/positions", "posembs", "a n d -> a 1 d n"),
  "decoder/register_positions": ("decoder/register_positions", "posembs", "n d -> 1 1 d n"),
  "decoder/mask_token": ("decoder/nested_dropout", "dropout_mask_token", "d -> d"),
  "decoder/null_token": ("decoder/null_condition", "nullcond", "d -> d"),
}
_BLOCK = {  # our array in a block: (official modules in it, layout, axis of the fused parts or -1)
  "attention/qkv/kernel": (("attn.wq", "attn.wk", "attn.wv"), "d h e -> (h e) d", 1),
  "attention/qkv/bias": (("attn.wq", "attn.wk", "attn.wv"), "h e -> (h e)", 0),
  "attention/out/kernel": (("attn.proj",), "h e d -> d (h e)", -1),
  "attention/out/bias": (("attn.proj",), "d -> d", -1),
  "mlp/in/kernel": (("mlp.fc1",), "d f -> f d", -1),
  "mlp/in/bias": (("mlp.fc1",), "f -> f", -1),
  "mlp/gate/kernel": (("mlp.fc3",), "d f -> f d", -1),
  "mlp/gate/bias": (("mlp.fc3",), "f -> f", -1),
  "mlp/out/kernel": (("mlp.fc2",), "f d -> d f", -1),
  "mlp/out/bias": (("mlp.fc2",), "d -> d", -1),
}
_ADALN = {"kernel": (".weight", "o d -> o d"), "bias": (".bias", "o -> o")}  # of all blocks, stacked


def entries(shapes: Mapping[str, Shape], roles: Mapping[str, str]) -> Iterator[Entry]:
  """Yields the entry of every array.

  Args:
    shapes: {path: shape} of a tokenizer's parameters.
    roles: our module -> full name of the official module, as in DEFAULT_ROLES.
  """
  for path, shape in shapes.items():
    if path.startswith("vae/"):
      yield diffusers.entry(path, shape, VAE_PREFIX)
    else:
      half = path.partition("/")[0]
      # The last block of a half has arrays of its own, after the stacked ones.
      depth = 1 + shapes.get(f"{half}/transformer/blocks/mlp/out/kernel", (0,))[0]
      yield _entry(path, shape, roles, depth)


def _entry(path: str, shape: Shape, roles: Mapping[str, str], depth: int) -> Entry:
  """Returns the entry of an array of the encoder or decoder, whose transformer has `depth` blocks."""
  module, _, kind = path.rpartition("/")
  half, _, inner = path.partition("/")
  blocks = roles[f"{half}/transformer"] + ".blocks"
  part = re.fullmatch(r"transformer/(blocks|last)/(.*)", inner)
  if part:
    modules, layout, axis = _BLOCK[part[2]]
    suffix = ".bias" if kind == "bias" else ".weight"
    if part[1] == "blocks":
      return block_entry(path, shape, blocks, modules, suffix, layout, axis)
    entry = block_entry(path, (1, *shape), blocks, modules, suffix, layout, axis)
    names = (name.replace(f"{blocks}.0.", f"{blocks}.{depth - 1}.", 1) for name in entry.names)
    return dataclasses.replace(entry, shape=shape, names=tuple(names), stacked=False)
  if module == "decoder/adaln":
    suffix, layout = _ADALN[kind]
    return block_entry(path, shape, blocks, ["adaLN_modulation.1"], suffix, layout)
  if path in _TABLES:
    role, name, layout = _TABLES[path]
    return Entry(path, shape, (f"{roles[role]}.{name}",), layout)
  suffix, layout = _LINEAR[kind]
  if module == "decoder/adaln/head":
    name = roles["decoder/head"] + ".adaLN_modulation.1"
  elif module.startswith("decoder/time_embed/"):
    name = roles["decoder/time_embed"] + (".mlp.0" if module.endswith("/in") else ".mlp.2")
  else:
    name = roles[module] + _INNER[module]
  return Entry(path, shape, (f"{name}.{suffix}",), layout)


def fixed_tables(
  model: FlexTok, roles: Mapping[str, str]
) -> dict[str, tuple[np.dtype, Shape, Callable[[], np.ndarray]]]:
  """Returns the sin-cos tables, which official files store and we compute.

  Returns:
    {official name: (dtype, shape [1, d, rows, columns], function that computes it)}.
  """

  def compute(shape: tuple[int, int], width: int) -> np.ndarray:
    return posemb.released_table(shape, width).astype(np.float32).transpose(2, 0, 1)[None]

  tables: dict[str, tuple[np.dtype, Shape, Callable[[], np.ndarray]]] = {}
  for half, part in (("encoder", model.encoder), ("decoder", model.decoder)):
    if part is not None and part.posemb.startswith("sincos"):
      shape, width = part.table_shape, part.width
      make = functools.partial(compute, shape, width)
      tables[f"{roles[f'{half}/positions']}.posembs"] = np.dtype(np.float32), (1, width, *shape), make
  return tables
