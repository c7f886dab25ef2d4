"""CLIP from Hugging Face folders and repositories."""

from collections.abc import Mapping
import dataclasses
import os

import jax
import jax.numpy as jnp

from flextok_jax.core import hub, literals
from flextok_jax.models.perception.clip import CLIP
from flextok_jax.weights.folder import Folder
from flextok_jax.weights.layout import Entry, Shape, shapes_of
from flextok_jax.weights.perception import files, vit

_TOWER = {  # defaults of config.json
  "num_hidden_layers": 12,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}
_IMAGE = _TOWER | {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_attention_heads": 12,
  "image_size": 224,
  "patch_size": 32,
}
_TEXT = _TOWER | {
  "hidden_size": 512,
  "intermediate_size": 2048,
  "num_attention_heads": 8,
  "vocab_size": 49408,
  "max_position_embeddings": 77,
}
_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")  # whole numbers
_SINGLE = {  # our array: (Hugging Face's name, layout)
  "image_projection/kernel": ("visual_projection.weight", "i o -> o i"),
  "text_projection/kernel": ("text_projection.weight", "i o -> o i"),
  "text_tower/embedding": ("text_model.embeddings.token_embedding.weight", "v d -> v d"),
  "text_tower/positions": ("text_model.embeddings.position_embedding.weight", "n d -> n d"),
  "text_tower/norm/scale": ("text_model.final_layer_norm.weight", "d -> d"),
  "text_tower/norm/bias": ("text_model.final_layer_norm.bias", "d -> d"),
}


def load_clip(source: str | os.PathLike) -> tuple[dict, dict]:
  """Loads CLIP.

  Args:
    source: a folder in Hugging Face's format, or a repository of the hub, of a CLIPModel.

  Returns:
    (sizes, params): the fields of CLIP other than dtype and attention, and its float32 parameters.

  Raises:
    FileNotFoundError: the source does not exist, or its weights only in a format that is not supported.
    ValueError: a damaged, foreign or unsupported file; the line names what is wrong.
  """
  folder = Folder(source, "CLIP model", "openai/clip-vit-base-patch32")
  sizes = _sizes(folder)
  side = sizes["image"]["grid"] * sizes["image"]["patch_size"]
  inputs = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
  abstract = jax.eval_shape(CLIP(**sizes).init, jax.random.key(0), *inputs)["params"]
  tensors = folder.tensors(ignored=_BUFFERS)
  return sizes, files.fill(folder.name, tensors, entries(shapes_of(abstract)), ("logit_scale",))


def entries(shapes: Mapping[str, Shape]) -> list[Entry]:
  """Returns the entries of CLIP's parameters, {path: shape}, with Hugging Face's names."""
  inside = lambda tower: {path.removeprefix(tower): x for path, x in shapes.items() if path.startswith(tower)}
  found = [
    dataclasses.replace(e, path=f"image_tower/{e.path}")
    for e in vit.entries(inside("image_tower/"), "clip", "vision_model.")
  ]
  for path, shape in inside("text_tower/blocks/").items():
    e = vit.vit_block_entry(f"blocks/{path}", shape, vit.NAMES["clip"], "text_model.", False)
    found.append(dataclasses.replace(e, path=f"text_tower/blocks/{path}"))
  return found + [Entry(path, shapes[path], (name,), layout) for path, (name, layout) in _SINGLE.items()]


def _sizes(folder: Folder) -> dict:
  path = folder.find(hub.CONFIG)
  fields = folder.read_json(path)
  if fields.get("model_type") != "clip":
    raise ValueError(f"{path}: model_type is {literals.quote(fields.get('model_type'))}, only 'clip' is supported")
  image, text = _section(path, fields, "vision_config", _IMAGE), _section(path, fields, "text_config", _TEXT)
  hidden = lambda section: dict(mlp_hidden=vit.whole(path, section, "intermediate_size", 2**20))
  return dict(
    image=dict(patch_bias=False, pre_norm=True)
    | vit.patch_sizes(path, image)
    | vit.common_sizes(path, image)
    | hidden(image),
    text=dict(
      vocab_size=vit.whole(path, text, "vocab_size", 2**22),
      max_length=vit.whole(path, text, "max_position_embeddings", 2**16),
    )
    | vit.common_sizes(path, text)
    | hidden(text),
    features=vit.whole(path, {"projection_dim": 512} | fields, "projection_dim", 2**16),
  )


def _section(path: str, fields: Mapping, name: str, defaults: Mapping) -> dict:
  """Returns a tower's fields; of the two sections in an old config.json the second counts, as in transformers."""
  first, second = fields.get(name) or {}, fields.get(f"{name}_dict")
  for part in (first, second or {}):
    if not isinstance(part, dict):
      raise ValueError(f"{path}: {name} must be an object, got {literals.quote(part)}")
  return {**defaults, **first} if second is None else {**first, **defaults, **second}
