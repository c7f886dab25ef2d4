"""Vision transformers from Hugging Face folders and repositories, and from files with facebookresearch's names."""

from collections.abc import Mapping
import dataclasses
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core import hub, literals
from flextok_jax.models.perception.vit import ViT
from flextok_jax.weights.folder import Folder
from flextok_jax.weights.layout import Entry, Shape, block_entry, shapes_of
from flextok_jax.weights.perception import files

_HEAD_DIM = 64  # of all models that facebookresearch has released; the files do not store it
ACTIVATIONS = {  # Hugging Face's names: ours
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
}
_PREFIXES = ("vit.", "dinov2.", "dinov2_with_registers.")  # of the backbone in a model with a head
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")  # unused: DINO has no pooler, but files may
_LAYOUTS = {  # of our arrays in a block if the official tensor has another shape
  "attention/qkv/kernel": "d n h e -> (n h e) d",
  "attention/qkv/bias": "n h e -> (n h e)",
  "attention/out/kernel": "h e d -> d (h e)",
  "mlp/in/kernel": "d f -> f d",
  "mlp/gate/kernel": "d f -> f d",
  "mlp/out/kernel": "f d -> d f",
}
# Official tables have a batch axis, except in CLIP.
_TABLES = {"cls": "d -> 1 1 d", "positions": "n d -> 1 n d", "registers": "n d -> 1 n d"}
_SPLIT = {"attention/qkv/kernel": ("d h e -> (h e) d", 1), "attention/qkv/bias": ("h e -> (h e)", 0)}
# Our module: official module. q, k and v are one or three modules, and an MLP with a gate has other names.
_DINOV2: dict[str, Any] = {
  "cls": "embeddings.cls_token",
  "positions": "embeddings.position_embeddings",
  "registers": "embeddings.register_tokens",
  "patch_embed": "embeddings.patch_embeddings.projection",
  "norm": "layernorm",
  "head": "classifier",
  "mask": "embeddings.mask_token",
  "blocks": "encoder.layer",
  "norm_1": "norm1",
  "attention/qkv": tuple(f"attention.attention.{x}" for x in ("query", "key", "value")),
  "attention/out": "attention.output.dense",
  "scale_1": "layer_scale1.lambda1",
  "norm_2": "norm2",
  "mlp/in": "mlp.fc1",
  "mlp/out": "mlp.fc2",
  "gated/in": "mlp.weights_in",  # and after it the gate
  "gated/out": "mlp.weights_out",
  "scale_2": "layer_scale2.lambda1",
}
NAMES: dict[str, dict[str, Any]] = {
  "dinov2": _DINOV2,
  "vit": _DINOV2
  | {
    "norm_1": "layernorm_before",
    "norm_2": "layernorm_after",
    "mlp/in": "intermediate.dense",
    "mlp/out": "output.dense",
  },
  "facebook": {
    "cls": "cls_token",
    "positions": "pos_embed",
    "registers": "register_tokens",
    "patch_embed": "patch_embed.proj",
    "norm": "norm",
    "mask": "mask_token",
    "blocks": "blocks",
    "norm_1": "norm1",
    "attention/qkv": ("attn.qkv",),
    "attention/out": "attn.proj",
    "scale_1": "ls1.gamma",
    "norm_2": "norm2",
    "mlp/in": "mlp.fc1",
    "mlp/out": "mlp.fc2",
    "gated/in": "mlp.w12",  # and after it the gate
    "gated/out": "mlp.w3",
    "scale_2": "ls2.gamma",
  },
  "clip": {
    "cls": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    "patch_embed": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "norm": "post_layernorm",
    "blocks": "encoder.layers",
    "norm_1": "layer_norm1",
    "attention/qkv": tuple(f"self_attn.{x}_proj" for x in "qkv"),
    "attention/out": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "mlp/in": "mlp.fc1",
    "mlp/out": "mlp.fc2",
  },
}


def load_vit(source: str | os.PathLike) -> tuple[dict, dict]:
  """Loads a vision transformer.

  It interpolates its position table as the code does that the file's names belong to. DINOv2's table, for 518 pixels,
  is always interpolated at 224 pixels, and transformers and the authors' code differ in how.

  Args:
    source: a folder in Hugging Face's format, or a repository of the hub, of a ViT (DINO) or a DINOv2 with or without
      registers and head; or a .safetensors or .npz file with the names of facebookresearch's dino and dinov2.

  Returns:
    (sizes, params): the fields of ViT other than dtype and attention, and its float32 parameters.

  Raises:
    FileNotFoundError: the source does not exist, or its weights only in a format that is not supported.
    ValueError: a damaged, foreign or unsupported file; the line names what is wrong.
  """
  path = os.fspath(source)
  if path.endswith((".safetensors", ".npz")):
    arrays = files.read(path)
    sizes = facebook_sizes(path, arrays)
    return sizes, files.fill(path, arrays, entries(shapes(sizes), "facebook"), (NAMES["facebook"]["mask"],))
  folder = Folder(source, "vision transformer", "facebook/dinov2-base")
  tensors = folder.tensors()
  style, sizes = _sizes(folder)
  names = NAMES[style]
  prefix = next((x for x in _PREFIXES if x + names["cls"] in tensors), "")
  head = names["head"] + ".weight"
  if style == "dinov2" and head in tensors:
    sizes["num_classes"] = len(tensors[head])
  allowed = {prefix + name for name in (names["mask"], *_POOLER)}
  return sizes, files.fill(folder.name, tensors, entries(shapes(sizes), style, prefix), allowed)


def shapes(sizes: Mapping) -> dict[str, Shape]:
  """Returns {path: shape} of the parameters of a ViT of these sizes."""
  side = sizes["grid"] * sizes["patch_size"]
  return shapes_of(jax.eval_shape(ViT(**sizes).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"])


def entries(shapes: Mapping[str, Shape], style: str, prefix: str = "") -> list[Entry]:
  """Returns the entries of a ViT's parameters.

  Args:
    shapes: {path: shape} of the parameters.
    style: a key of NAMES.
    prefix: of all names except the head's, if the ViT is a part of another model.
  """
  names, found = NAMES[style], []
  for path, shape in shapes.items():
    if path.startswith("blocks/"):
      gated = "blocks/mlp/gate/bias" in shapes
      found.append(vit_block_entry(path, shape, names, prefix, gated))
      continue
    module, _, kind = path.rpartition("/")
    name = names[module or kind]
    if not module:
      layout = _TABLES[kind] if style != "clip" else _TABLES[kind].replace(" 1", "")
    else:
      name += ".bias" if kind == "bias" else ".weight"
      layout = {1: "d -> d", 2: "i o -> o i", 4: "p q c d -> d c p q"}[len(shape)]
    found.append(Entry(path, shape, (name if module == "head" else prefix + name,), layout))
  return found


def vit_block_entry(path: str, shape: Shape, names: Mapping, prefix: str, gated: bool) -> Entry:
  """Returns the entry of an array "blocks/..." of a ViT; `names` are the values of NAMES."""
  inner = path.removeprefix("blocks/")
  module, _, kind = inner.rpartition("/")
  share = (0, 1)
  if gated and module in ("mlp/in", "mlp/gate"):  # one official module
    module, share = "mlp/in", (int(module == "mlp/gate"), 2)
  modules = names[(module.replace("mlp/", "gated/") if gated else module) or kind]
  layout, axis = _LAYOUTS.get(inner, "d -> d"), -1
  if isinstance(modules, str):
    modules = (modules,)
  elif len(modules) > 1:
    layout, axis = _SPLIT[inner]
  suffix = "" if not module else ".bias" if kind == "bias" else ".weight"
  entry = block_entry(path, shape, prefix + names["blocks"], modules, suffix, layout, axis)
  return dataclasses.replace(entry, share=share)


def facebook_sizes(path: str, tensors: Mapping[str, np.ndarray]) -> dict:
  """Reads the sizes of a ViT from tensors with facebookresearch's names; heads have 64 features.

  Raises:
    ValueError: the tensors are not those of a ViT.
  """

  def shape(name: str, rank: int) -> tuple[int, ...]:
    found = np.shape(tensors.get(name, ()))
    if len(found) != rank or 0 in found:
      raise ValueError(f"{path} has no {name} with {rank} axes: not a vision transformer with facebookresearch's names")
    return found

  width, _, patch, _ = shape("patch_embed.proj.weight", 4)
  grid = math.isqrt(shape("pos_embed", 3)[1] - 1)
  depth = len([name for name in tensors if re.fullmatch(r"blocks\.\d+\.norm1\.weight", name)])
  gated, registers = "blocks.0.mlp.w3.weight" in tensors, "register_tokens" in tensors
  hidden = shape(f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight", 2)[1]
  if width % _HEAD_DIM or grid < 1 or depth < 1:
    raise ValueError(f"{path}: width {width}, {depth} blocks and {grid} x {grid} positions are not those of DINO")
  return dict(
    patch_size=patch,
    grid=grid,
    width=width,
    depth=depth,
    head_dim=_HEAD_DIM,
    mlp_hidden=hidden,
    gated_mlp=gated,
    activation="silu" if gated else "gelu",
    qkv_bias="blocks.0.attn.qkv.bias" in tensors,
    layer_scale="blocks.0.ls1.gamma" in tensors,
    norm_epsilon=1e-6,
    num_registers=shape("register_tokens", 3)[1] if registers else 0,
    antialias=registers,
    offset=0.0 if registers else 0.1,
  )


def whole(path: str, fields: Mapping, name: str, limit: int) -> int:
  """Returns a field of a config.json that must be a whole number from 1 to a limit, which bounds our work on a file."""
  value = fields.get(name)
  if type(value) is not int or not 1 <= value <= limit:
    raise ValueError(f"{path}: {name} must be a whole number from 1 to {limit}, got {literals.quote(value)}")
  return value


def common_sizes(path: str, fields: Mapping) -> dict:
  """Reads the fields of a config.json that a ViT and CLIP's towers share.

  Returns:
    {"width", "depth", "head_dim", "activation", "norm_epsilon"}.
  """
  width = whole(path, fields, "hidden_size", 2**16)
  heads = whole(path, fields, "num_attention_heads", 2**12)
  if width % heads:
    raise ValueError(f"{path}: hidden_size={width} is not a multiple of num_attention_heads={heads}")
  epsilon = fields.get("layer_norm_eps")
  if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
    raise ValueError(f"{path}: layer_norm_eps must lie between 0 and 1, got {literals.quote(epsilon)}")
  activation = fields.get("hidden_act")
  if activation not in list(ACTIVATIONS):
    raise ValueError(
      f"{path}: hidden_act {literals.quote(activation)} is not supported, only {', '.join(map(repr, ACTIVATIONS))} are"
    )
  return dict(
    width=width,
    depth=whole(path, fields, "num_hidden_layers", 1000),
    head_dim=width // heads,
    activation=ACTIVATIONS[activation],
    norm_epsilon=float(epsilon),
  )


def patch_sizes(path: str, fields: Mapping) -> dict:
  """Reads {"patch_size", "grid"} from the fields of a config.json."""
  if fields.get("num_channels", 3) != 3:
    raise ValueError(f"{path}: num_channels must be 3, got {literals.quote(fields['num_channels'])}")
  patch = whole(path, fields, "patch_size", 2**10)
  side = whole(path, fields, "image_size", 2**14)
  if side < patch:
    raise ValueError(f"{path}: image_size={side} is less than patch_size={patch}")
  return dict(patch_size=patch, grid=side // patch)


def _sizes(folder: Folder) -> tuple[str, dict]:
  """Returns (key of NAMES, fields of the ViT)."""
  path = folder.find(hub.CONFIG)
  fields = folder.read_json(path)
  kind = fields.get("model_type")
  if kind not in ("vit", "dinov2", "dinov2_with_registers"):
    raise ValueError(
      f"{path}: model_type is {literals.quote(kind)}, only 'vit', 'dinov2' and 'dinov2_with_registers' are supported"
    )
  sizes = patch_sizes(path, fields) | common_sizes(path, fields)
  sizes["qkv_bias"] = bool(fields.get("qkv_bias", True))
  if kind == "vit":
    return "vit", sizes | dict(mlp_hidden=whole(path, fields, "intermediate_size", 2**20))
  ratio = fields.get("mlp_ratio", 4)
  if type(ratio) not in (int, float) or not 0 < ratio <= 64:
    raise ValueError(f"{path}: mlp_ratio must lie between 0 and 64, got {literals.quote(ratio)}")
  hidden, gated = int(sizes["width"] * ratio), bool(fields.get("use_swiglu_ffn", False))
  sizes |= dict(mlp_hidden=hidden, gated_mlp=gated, layer_scale=True)
  if gated:
    sizes |= dict(mlp_hidden=(int(hidden * 2 / 3) + 7) // 8 * 8, activation="silu")
  if kind == "dinov2_with_registers":
    sizes |= dict(num_registers=whole(path, fields, "num_register_tokens", 2**10), antialias=True)
  return "dinov2", sizes
