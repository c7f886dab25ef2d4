"""T5 encoders from Hugging Face folders and repositories.

Only the encoder's tensors are read. Nothing that a file names is imported or called.
"""

from collections.abc import Mapping
import math
import os

from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.config import float_dtype
from flextok_jax.core import hub, literals, tensor_file
from flextok_jax.models.perception.t5 import T5Encoder
from flextok_jax.parallel import sharding
from flextok_jax.weights.folder import Folder
from flextok_jax.weights.names import Entry

_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one tensor; files have either or both
_LIMITS = {  # of the whole numbers in config.json: what a T5 can be, so that no file makes us work without end
  "vocab_size": 2**22,
  "d_model": 2**16,
  "d_kv": 2**12,
  "d_ff": 2**20,
  "num_layers": 1000,
  "num_heads": 2**12,
  "relative_attention_num_buckets": 2**12,
  "relative_attention_max_distance": 2**20,
}
_DEFAULTS = {"relative_attention_max_distance": 128}  # and "relu": where config.json is older than the field
_FEED_FORWARD = {"gated-gelu": True, "relu": False}
_ACTIVATIONS = {True: "gelu_new", False: "relu"}
_MODULES = {  # ours in a block: (official modules in it, layout, axis of the fused parts or -1)
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
    (sizes, params): the fields of models/perception/t5.py's T5Encoder, dtype aside, and its parameters.

  Raises:
    FileNotFoundError: nothing there, or weights only in a format that we do not read.
    ValueError: a damaged, foreign or unsupported file; the line names what is wrong.
  """
  dtype = np.dtype(float_dtype("dtype", dtype))
  folder = _folder(source)
  sizes = _sizes(folder)
  abstract = jax.eval_shape(
    T5Encoder(**sizes).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
  )["params"]
  shapes = {path: x.shape for path, x in flatten_dict(unbox(abstract), sep="/").items()}
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = dict.fromkeys(shapes, device)
  else:
    shardings = flatten_dict(sharding.tree_shardings(abstract, mesh), sep="/")

  have, open_file = folder.tensors()
  embedding = next((name for name in _EMBEDDINGS if name in have), _EMBEDDINGS[0])
  todo = entries(shapes, embedding)
  wanted = {name for e in todo for name in e.names}
  tensor_file.check_names(folder.name, wanted.intersection(have), wanted)
  for e in todo:
    for name in e.names:
      file = open_file(name)
      if file.shapes.get(name) != e.official_shape:
        raise ValueError(
          f"{file.path}: {name} has shape {list(file.shapes.get(name, ())) or 'none'}, the "
          f"{hub.CONFIG} asks for {list(e.official_shape)}"
        )
  flat = {}
  # The largest first: beside it stands a copy where jax makes one, and the others are not there yet.
  for e in sorted(todo, key=lambda e: -math.prod(e.shape)):
    array = tensor_file.empty(e.shape, dtype)
    for i, name in enumerate(e.names):
      e.from_official(open_file(name).read(name), array, i)
    flat[e.path] = jax.block_until_ready(jax.device_put(array, shardings[e.path]))
    del array
  return sizes, unflatten_dict({path: flat[path] for path in shapes}, sep="/")


def read_sizes(source: str | os.PathLike) -> dict:
  """Returns the fields of models/perception/t5.py's T5Encoder, dtype aside, of a folder or repository; see load_t5."""
  return _sizes(_folder(source))


def entries(shapes: Mapping[str, tuple[int, ...]], embedding: str = _EMBEDDINGS[0], prefix: str = "") -> list[Entry]:
  """Returns where the arrays of a T5Encoder, {path: shape}, stand among Hugging Face's tensors.

  Args:
    embedding: the name of the token embedding, which has two.
    prefix: before all names, where the encoder is a part of something else.
  """
  single = {
    "embedding": (embedding, "v d -> v d"),
    "relative_bias": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "n h -> n h"),
    "norm/scale": ("encoder.final_layer_norm.weight", "d -> d"),
  }
  found = []
  for path, shape in shapes.items():
    if path in single:
      name, layout = single[path]
      found.append(Entry(path, shape, (prefix + name,), layout))
      continue
    modules, layout, axis = _MODULES[path.removeprefix("blocks/")]
    if axis >= 0 and shape[1 + axis] == 1:
      modules = ("1.DenseReluDense.wi",)  # of an MLP without gate
    names = (f"{prefix}encoder.block.{i}.layer.{module}.weight" for i in range(shape[0]) for module in modules)
    found.append(Entry(path, shape, tuple(names), layout, True, len(modules), axis))
  return found


def _folder(source: str | os.PathLike) -> Folder:
  return Folder(source, "T5 encoder", "google/flan-t5-xl")


def _sizes(folder: Folder) -> dict:
  path = folder.find(hub.CONFIG)
  config = folder.read_json(path)
  kind = config.get("model_type")
  if kind != "t5":
    raise ValueError(f"{path}: model_type is {literals.quote(kind)}, only 't5' is read")
  sizes = {}
  for name, limit in _LIMITS.items():
    value = config.get(name, _DEFAULTS.get(name))
    if type(value) is not int or not 1 <= value <= limit:
      raise ValueError(f"{path}: {name} must be a whole number from 1 to {limit}, got {literals.quote(value)}")
    sizes[name] = value
  buckets, distance = sizes["relative_attention_num_buckets"], sizes["relative_attention_max_distance"]
  if buckets % 4 or distance <= buckets // 4:
    raise ValueError(
      f"{path}: relative_attention_num_buckets={buckets} and relative_attention_max_distance={distance} "
      "are not computed: the buckets must be a multiple of 4, the distance more than a quarter of them"
    )
  epsilon = config.get("layer_norm_epsilon")
  if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
    raise ValueError(f"{path}: layer_norm_epsilon must lie between 0 and 1, got {literals.quote(epsilon)}")
  feed_forward = config.get("feed_forward_proj", "relu")
  if feed_forward not in list(_FEED_FORWARD):
    raise ValueError(
      f"{path}: feed_forward_proj {literals.quote(feed_forward)} is not computed, only "
      f"{' and '.join(map(repr, _FEED_FORWARD))} are"
    )
  gated = _FEED_FORWARD[feed_forward]
  for name, known in (("dense_act_fn", _ACTIVATIONS[gated]), ("is_gated_act", gated), ("quantization_config", None)):
    if config.get(name, known) != known:
      raise ValueError(f"{path}: {name} {literals.quote(config[name])} is not computed")
  return {**sizes, "layer_norm_epsilon": float(epsilon), "gated": gated}
