"""T5 encoders from Hugging Face folders and repositories.

Only the encoder's tensors are read. Nothing that a file names is imported or called.
"""

from collections.abc import Mapping
import os

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.config import float_dtype
from flextok_jax.core import hub, literals, tensor_file
from flextok_jax.models.perception.t5 import T5Encoder
from flextok_jax.weights import layout
from flextok_jax.weights.folder import Folder
from flextok_jax.weights.layout import Entry, Shape

_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # names of the same tensor; files have either or both
_LIMITS = {  # of the whole numbers in config.json, to bound our work on a file
  "vocab_size": 2**22,
  "d_model": 2**16,
  "d_kv": 2**12,
  "d_ff": 2**20,
  "num_layers": 1000,
  "num_heads": 2**12,
  "relative_attention_num_buckets": 2**12,
  "relative_attention_max_distance": 2**20,
}
_DEFAULTS = {"relative_attention_max_distance": 128}  # of fields that an old config.json may lack
_FEED_FORWARD = {"gated-gelu": True, "relu": False}
_ACTIVATIONS = {True: "gelu_new", False: "relu"}
_MODULES = {  # our array in a block: (official modules in it, layout, axis of the fused parts or -1)
  "norm_1/scale": (("0.layer_norm",), "d -> d", -1),
  "qkv/kernel": (tuple(f"0.SelfAttention.{x}" for x in "qkv"), "d h e -> (h e) d", 1),
  "attention_out/kernel": (("0.SelfAttention.o",), "h e d -> d (h e)", -1),
  "norm_2/scale": (("1.layer_norm",), "d -> d", -1),
  "mlp_in/kernel": (("1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1"), "d f -> f d", 1),
  "mlp_out/kernel": (("1.DenseReluDense.wo",), "f d -> d f", -1),
}


def load_t5(source: str | os.PathLike, dtype: str, mesh: jax.sharding.Mesh | None = None) -> tuple[dict, dict]:
  """Loads a T5 encoder.

  Args:
    source: a folder in Hugging Face's format, or a repository of the hub, of a whole T5 or of its encoder.
    dtype: type of all arrays.
    mesh: devices to place the arrays on by their logical axes; None: the default device.

  Returns:
    (sizes, params): the fields of T5Encoder other than dtype, and its parameters.

  Raises:
    FileNotFoundError: the source does not exist, or its weights only in a format that is not supported.
    ValueError: a damaged, foreign or unsupported file; the line names what is wrong.
  """
  param_dtype = np.dtype(float_dtype("dtype", dtype))
  folder = _folder(source)
  sizes = _sizes(folder)
  abstract = jax.eval_shape(
    T5Encoder(**sizes).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
  )["params"]
  have = folder.tensors()
  embedding = next((name for name in _EMBEDDINGS if name in have), _EMBEDDINGS[0])
  found = entries(layout.shapes_of(abstract), embedding)
  wanted = {name for e in found for name in e.names}
  tensor_file.check_names(folder.name, wanted.intersection(have), wanted)  # a decoder is ignored
  with tensor_file.named(folder.name):
    for e in found:
      for name in e.names:
        e.check_shape(name, have.shapes[name])
    where = layout.placements(abstract, mesh)
    return sizes, layout.read_arrays(found, have.read, lambda path: param_dtype, where)


def read_sizes(source: str | os.PathLike) -> dict:
  """Returns the fields of T5Encoder other than dtype. Arguments and errors are load_t5's."""
  return _sizes(_folder(source))


def entries(shapes: Mapping[str, Shape], embedding: str = _EMBEDDINGS[0]) -> list[Entry]:
  """Returns the entries of a T5Encoder's parameters with Hugging Face's names.

  Args:
    shapes: {path: shape} of the parameters.
    embedding: name of the token embedding in the file.
  """
  single = {
    "embedding": (embedding, "v d -> v d"),
    "relative_bias": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "n h -> n h"),
    "norm/scale": ("encoder.final_layer_norm.weight", "d -> d"),
  }
  found = []
  for path, shape in shapes.items():
    if path in single:
      name, pattern = single[path]
      found.append(Entry(path, shape, (name,), pattern))
      continue
    modules, pattern, axis = _MODULES[path.removeprefix("blocks/")]
    if axis >= 0 and shape[1 + axis] == 1:
      modules = ("1.DenseReluDense.wi",)  # of an MLP without gate
    names = (f"layer.{module}" for module in modules)
    found.append(layout.block_entry(path, shape, "encoder.block", names, ".weight", pattern, axis))
  return found


def _folder(source: str | os.PathLike) -> Folder:
  return Folder(source, "T5 encoder", "google/flan-t5-xl")


def _sizes(folder: Folder) -> dict:
  path = folder.find(hub.CONFIG)
  fields = folder.read_json(path)
  kind = fields.get("model_type")
  if kind != "t5":
    raise ValueError(f"{path}: model_type is {literals.quote(kind)}, only 't5' is supported")
  sizes = {}
  for name, limit in _LIMITS.items():
    value = fields.get(name, _DEFAULTS.get(name))
    if type(value) is not int or not 1 <= value <= limit:
      raise ValueError(f"{path}: {name} must be a whole number from 1 to {limit}, got {literals.quote(value)}")
    sizes[name] = value
  buckets, distance = sizes["relative_attention_num_buckets"], sizes["relative_attention_max_distance"]
  if buckets % 4 or distance <= buckets // 4:
    raise ValueError(
      f"{path}: relative_attention_num_buckets={buckets} and relative_attention_max_distance={distance} "
      "are not supported: the buckets must be a multiple of 4, the distance more than a quarter of them"
    )
  epsilon = fields.get("layer_norm_epsilon")
  if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
    raise ValueError(f"{path}: layer_norm_epsilon must lie between 0 and 1, got {literals.quote(epsilon)}")
  feed_forward = fields.get("feed_forward_proj", "relu")
  if feed_forward not in list(_FEED_FORWARD):
    raise ValueError(
      f"{path}: feed_forward_proj {literals.quote(feed_forward)} is not supported, only "
      f"{' and '.join(map(repr, _FEED_FORWARD))} are"
    )
  gated = _FEED_FORWARD[feed_forward]
  for name, known in (("dense_act_fn", _ACTIVATIONS[gated]), ("is_gated_act", gated), ("quantization_config", None)):
    if fields.get(name, known) != known:
      raise ValueError(f"{path}: {name} {literals.quote(fields[name])} is not supported")
  return {**sizes, "layer_norm_epsilon": float(epsilon), "gated": gated}
