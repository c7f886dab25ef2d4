"""Weights of the authors' generators (FlexAR): safetensors under the names of their framework, to ours.

Names and shapes of the weights tell nearly all of a model; settings and a configuration file (official_ar_config.py)
tell the rest, and may not contradict them. Their linear layers are [out, in]; rows of fused queries, keys and values
are all of q, then k, then v, each by head.
"""

from collections.abc import Mapping
import itertools
import math
import os

from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax import stages
from flextok_jax.config import derive, float_dtype
from flextok_jax.core import hub, tensor_file
from flextok_jax.core.tensor_file import TensorFile, named
from flextok_jax.models.ar.generator import sincos_table
from flextok_jax.parallel import sharding
from flextok_jax.stages.ar import mlp_hidden
from flextok_jax.weights.names import Entry
from flextok_jax.weights.official import generator_config as official_ar_config
from flextok_jax.weights.official.generator_facts import Facts, add_settings

WEIGHTS = "model.safetensors"
CONFIGS = ("config.yaml", "config.yml", "config.json")
_MODEL = "models.ar_image_model."
_TEXT_MLP = "models.text_encoder.mlp."
_IGNORED = ("models.text_encoder.t5_embedder.", "models.image_tokenizer.")  # parts that are loaded on their own
_GUIDANCE = {"class": 1.5, "text": 3.0, "none": 1.0}  # the authors' scales

_OUTSIDE = {  # ours: (official name, layout)
  "ar/embedding": (f"{_MODEL}preprocessor.embedding.weight", "n d -> n d"),
  "ar/start": (f"{_MODEL}preprocessor.sos_token_embed", "d -> 1 1 d"),
  "ar/positions": (f"{_MODEL}preprocessor.positional_embedding", "n d -> n d"),
  "ar/class_embedding": (f"{_MODEL}preprocessor.cls_embedding.weight", "n d -> n d"),
  "ar/norm/scale": (f"{_MODEL}trunk.post_trunk_norm.weight", "d -> d"),
  "ar/norm/bias": (f"{_MODEL}trunk.post_trunk_norm.bias", "d -> d"),
  "ar/head_norm/scale": (f"{_MODEL}head.norm.weight", "d -> d"),
  "ar/head_norm/bias": (f"{_MODEL}head.norm.bias", "d -> d"),
  "ar/readout/kernel": (f"{_MODEL}head.linear.weight", "d n -> n d"),
  "ar/readout/bias": (f"{_MODEL}head.linear.bias", "n -> n"),
  "text_mlp/in/kernel": (f"{_TEXT_MLP}fc1.weight", "i o -> o i"),
  "text_mlp/out/kernel": (f"{_TEXT_MLP}fc2.weight", "i o -> o i"),
}
_BLOCK = {  # ours in a block: (official modules in it, layout, axis of the fused parts or -1)
  "attention/qkv/kernel": (("{attn}.qkv",), "d p h e -> (p h e) d", -1),
  "attention/qkv/bias": (("{attn}.qkv",), "p h e -> (p h e)", -1),
  "attention/out/kernel": (("{attn}.proj",), "h e d -> d (h e)", -1),
  "attention/out/bias": (("{attn}.proj",), "d -> d", -1),
  "cross/q/kernel": (("cross_attn.Wq",), "d h e -> (h e) d", -1),
  "cross/q/bias": (("cross_attn.Wq",), "h e -> (h e)", -1),
  "cross/kv/kernel": (("cross_attn.Wk", "cross_attn.Wv"), "d h e -> (h e) d", 1),
  "cross/kv/bias": (("cross_attn.Wk", "cross_attn.Wv"), "h e -> (h e)", 0),
  "cross/out/kernel": (("cross_attn.proj",), "h e d -> d (h e)", -1),
  "cross/out/bias": (("cross_attn.proj",), "d -> d", -1),
  "mlp/in/kernel": (("mlp.fc1", "mlp.fc3"), "d f -> f d", 1),
  "mlp/in/bias": (("mlp.fc1", "mlp.fc3"), "f -> f", 0),
  "mlp/out/kernel": (("mlp.fc2",), "f d -> d f", -1),
  "mlp/out/bias": (("mlp.fc2",), "d -> d", -1),
} | {
  f"{ours}/{kind}": ((official,), "d -> d", -1)
  for ours, official in {
    **{f"norm_{i}": f"norm_{i}" for i in (1, 2, 3)},
    **{f"attention/{x}_norm": f"{{attn}}.{x}_norm" for x in "qk"},
    **{f"cross/{x}_norm": f"cross_attn.{x}_norm" for x in "qk"},
  }.items()
  for kind in ("scale", "bias")
}
_APART = {  # of the class of attention with layers of their own for queries, keys and values
  "attention/qkv/kernel": (("{attn}.q_proj", "{attn}.k_proj", "{attn}.v_proj"), "d h e -> (h e) d", 1),
  "attention/qkv/bias": (("{attn}.q_proj", "{attn}.k_proj", "{attn}.v_proj"), "h e -> (h e)", 0),
}
_BIASES = {  # fact: what the names of such biases end in
  "qkv_bias": (".qkv.bias", ".q_proj.bias", ".Wq.bias"),
  "proj_bias": (".proj.bias",),
  "mlp_bias": (".fc1.bias", ".fc2.bias", ".fc3.bias"),
  "head_bias": ("head.linear.bias",),
}


def load(
  source: str | os.PathLike,
  settings: Mapping[str, object],
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[ConfigDict, dict]:
  """Loads a generator in the authors' format.

  Args:
    source: a .safetensors file; a folder with one, and perhaps a config.yaml, config.yml or config.json (the first of
      these counts); or a repository of the Hugging Face hub with config.yaml and model.safetensors.
    settings: what is known of the model. All may be left out; what the weights or the configuration tell as well must
      agree. dim, depth, vocab (ids), num_tokens, num_classes (None: none), cross (conditioned on text), bias (of all
      linear layers), norm and qk_norm ("layernorm", "rmsnorm"; qk_norm also None), ffn ("mlp_gelu", "swiglu"),
      head_layernorm, text_dim: the weights tell them. head_dim: the weights tell it where there is a qk_norm, else 64
      [paper]. pos_embed ("absolute", "sincos1d", "sincos2d"): a stored table that equals the sincos1d table is taken
      for it, any other is kept as it is. mlp_ratio, ffn_multiple_of: any that give the hidden width of the weights.
      norm_eps, qk_norm_eps: 1e-5 of a layernorm and 1e-6 of an rmsnorm. readout_multiplier, or mup_base_width for
      base / dim: 1, as the released weights hold it already. text_len: 120 tokens a text at most. text_encoder: folder
      or repository of the T5, google/flan-t5-xl; this one alone may differ from the configuration's.
    dtype: type of parameters and computation; None: float32, as in the authors' code.
    mesh: devices to place the arrays on by their logical axes; None: the default device.

  Returns:
    (config, params): a config of stage "ar" with all of c.ar and c.text of flextok_jax/config.py; trees "ar" and, of models
    conditioned on text, "text_mlp". The readout's multiplier is in its kernel, layers without bias beside layers with
    one have zeros.

  Raises:
    FileNotFoundError: nothing there, or it cannot be downloaded.
    ValueError: a damaged, foreign or unsupported file, an unknown setting, or a contradiction; it names both sides.
  """
  dtype = jnp.dtype(float_dtype("dtype", dtype or "float32"))
  weights, configuration = _find(os.fspath(source))
  file = TensorFile(weights, _IGNORED)
  facts = Facts()
  add_settings(facts, settings, "the settings")
  if configuration:
    official_ar_config.add_file(facts, configuration)
  with named(file.path):
    _add_weights(facts, file)
    table = _positions(facts, file)
    config = _config(facts, file, dtype.name, "sincos1d" if table else "absolute")
    multiplier = _multiplier(facts)
  return config, _read(file, config, multiplier, mesh)


def _find(source: str) -> tuple[str, str | None]:
  """Returns the paths of weights and configuration; the latter may be None."""
  if os.path.isfile(source):
    return source, None
  if os.path.isdir(source):
    weights = sorted(name for name in os.listdir(source) if name.endswith(".safetensors"))
    if WEIGHTS in weights:
      weights = [WEIGHTS]
    if not weights:
      raise FileNotFoundError(f"folder {source} holds no generator: no .safetensors file in it")
    if len(weights) > 1:
      raise ValueError(f"folder {source} holds several .safetensors files ({', '.join(weights)[:120]}): give one")
    configs = [path for name in CONFIGS if os.path.isfile(path := os.path.join(source, name))]
    return os.path.join(source, weights[0]), next(iter(configs), None)
  if hub.is_repository(source):
    needed = f"{CONFIGS[0]} and {WEIGHTS}"
    config = hub.fetch_file(source, CONFIGS[0], needed=needed)
    return hub.fetch_file(source, WEIGHTS, needed=needed), config
  raise FileNotFoundError(f"no such generator: {source}; give a file, a folder or a repository on Hugging Face")


def _shape(file: TensorFile, name: str, rank: int) -> tuple[int, ...]:
  if name not in file.shapes:
    raise ValueError(f"it lacks the tensor {name}, which every generator in this format has")
  if len(file.shapes[name]) != rank:
    raise ValueError(f"{name} has shape {list(file.shapes[name])}, expected {rank} axes")
  return file.shapes[name]


def _add_weights(facts: Facts, file: TensorFile):
  """Adds what names and shapes tell."""
  say = lambda name, value: facts.add(name, value, "the weights")
  have = file.shapes
  if not any(name.startswith(_MODEL) for name in have):
    raise ValueError(f"no generator in the authors' format: none of its tensors begins with {_MODEL}")
  shape = lambda name, rank: _shape(file, f"{_MODEL}{name}", rank)
  ids, width = shape("preprocessor.embedding.weight", 2)
  say("vocab", ids)
  say("dim", width)
  say("num_tokens", shape("preprocessor.positional_embedding", 2)[0])
  facts.add("vocab", shape("head.linear.weight", 2)[0], "the weights' head.linear")
  shape("trunk.post_trunk_norm.weight", 1)  # a model without it would be another

  prefix = f"{_MODEL}trunk.blocks."
  blocks = {name[len(prefix) :].partition(".")[0] for name in have if name.startswith(prefix)}
  if not blocks or blocks != {str(i) for i in range(len(blocks))}:
    raise ValueError(f"it has no whole series {prefix}0, 1, 2, ...")
  say("depth", len(blocks))
  block = f"{prefix}0."
  text = any(name.startswith(f"{block}cross_attn.") for name in have)
  say("cross", text)
  classes = f"{_MODEL}preprocessor.cls_embedding.weight"
  if text and classes in have:
    raise ValueError(f"it has both {classes} and {block}cross_attn: conditioned on classes or on texts, not on both")
  say("num_classes", _shape(file, classes, 2)[0] if classes in have else None)
  kind = lambda name: "layernorm" if f"{name}.bias" in have else "rmsnorm"
  say("norm", kind(f"{block}norm_1"))
  q_norm = f"{block}{'self_attn' if text else 'attn'}.q_norm"
  say("qk_norm", kind(q_norm) if f"{q_norm}.weight" in have else "none")
  if f"{q_norm}.weight" in have:
    say("head_dim", _shape(file, f"{q_norm}.weight", 1)[0])
  say("ffn", "swiglu" if f"{block}mlp.fc3.weight" in have else "mlp_gelu")
  say("head_layernorm", f"{_MODEL}head.norm.weight" in have)
  for role, ends in _BIASES.items():
    say(role, any(name.startswith(_MODEL) and name.endswith(ends) for name in have))
  if text:
    say("text_dim", _shape(file, f"{_TEXT_MLP}fc1.weight", 2)[1])


def _positions(facts: Facts, file: TensorFile) -> bool:
  """Returns whether the stored table of positions is the fixed one."""
  name = f"{_MODEL}preprocessor.positional_embedding"
  kind, shape = facts.get("pos_embed"), _shape(file, name, 2)
  if kind in ("absolute", "sincos2d"):
    return False
  if shape[1] != facts.get("dim"):
    raise ValueError(f"{name} has shape {list(shape)}, but dim is {facts.get('dim')} in {facts.origin('dim')}")
  gap = math.inf
  if shape[1] % 4 == 0:
    gap = float(np.abs(file.read(name).astype(np.float64) - sincos_table(*shape)).max())
  same = gap <= max(2 * float(jnp.finfo(file.dtypes[name]).eps), 1e-4)
  if kind == "sincos1d" and not same:
    raise ValueError(
      f"pos_embed is 'sincos1d' in {facts.origin('pos_embed')}, but the table in the weights differs by "
      f"{gap:.2g} from it"
    )
  return same


def _multiplier(facts: Facts) -> float:
  if "mup_base_width" in facts:
    facts.add(
      "readout_multiplier",
      facts.get("mup_base_width") / facts.get("dim"),
      f"{facts.origin('mup_base_width')} (mup_base_width / dim)",
    )
  return facts.get("readout_multiplier", 1.0)


def _config(facts: Facts, file: TensorFile, dtype: str, pos_embed: str) -> ConfigDict:
  condition = "text" if facts.get("cross") else "class" if facts.get("num_classes") else "none"
  config = derive(stage="ar", dtype=dtype)
  config.ar.update(
    width=facts.get("dim"),
    depth=facts.get("depth"),
    head_dim=facts.get("head_dim", 64),
    num_ids=facts.get("vocab"),
    num_tokens=facts.get("num_tokens"),
    condition=condition,
    num_classes=facts.get("num_classes") or 1000,
    norm=facts.get("norm"),
    norm_eps=float(facts.get("norm_eps", 0)),
    qk_norm=facts.get("qk_norm"),
    qk_norm_eps=float(facts.get("qk_norm_eps", 0)),
    ffn=facts.get("ffn"),
    bias=any(facts.get(role) for role in _BIASES),
    pos_embed=pos_embed,
    head_layernorm=facts.get("head_layernorm"),
    guidance_scale=float(facts.get("guidance_scale", _GUIDANCE[condition])),
    temperature=float(facts.get("temperature", 1)),
    top_k=facts.get("top_k", 0),
    top_p=float(facts.get("top_p", 0)),
  )
  config.text.update(
    max_length=facts.get("text_len", 120),
    path=facts.get("text_encoder", "google/flan-t5-xl"),
    features=facts.get("text_dim", 2048),
    mlp_hidden=_shape(file, f"{_TEXT_MLP}fc1.weight", 2)[0] if condition == "text" else 2048,
  )
  width, head_dim = config.ar.width, config.ar.head_dim
  if not head_dim or width % head_dim:
    origin = facts.origin("head_dim") if "head_dim" in facts else "the default"
    raise ValueError(f"head_dim {head_dim} ({origin}) does not divide dim {width} of the weights: set head_dim")
  _set_hidden(facts, config.ar, _shape(file, f"{_MODEL}trunk.blocks.0.mlp.fc1.weight", 2)[0])
  return config.lock()


def _set_hidden(facts: Facts, c: ConfigDict, hidden: int):
  """Sets mlp_ratio and ffn_multiple_of as said, else such that the MLP has the hidden width of the weights."""
  exact = (hidden if c.ffn == "mlp_gelu" else (3 * hidden + 1) // 2) / c.width
  ratios, multiples = (4.0, exact, math.nextafter(exact, math.inf)), (64, 256, 128, 32, 16, 8, 4, 2, 1)
  if "mlp_ratio" in facts:
    ratios = (float(facts.get("mlp_ratio")),)
  if "ffn_multiple_of" in facts:
    multiples = (facts.get("ffn_multiple_of"),)
  for c.mlp_ratio, c.ffn_multiple_of in itertools.product(ratios, multiples):
    if mlp_hidden(c) == hidden:
      return
  said = " and ".join(
    f"{name} {facts.get(name)} in {facts.origin(name)}" for name in ("mlp_ratio", "ffn_multiple_of") if name in facts
  )
  raise ValueError(f"the MLP's hidden width is {hidden} in the weights, which contradicts {said}")


def _entry(path: str, shape: tuple[int, ...], text: bool, apart: bool) -> Entry:
  """Returns where one of our arrays stands; `apart`: queries, keys and values are layers of their own."""
  if path in _OUTSIDE:
    name, layout = _OUTSIDE[path]
    return Entry(path, shape, (name,), layout)
  inner = path.removeprefix("ar/blocks/")
  modules, layout, axis = (_BLOCK | _APART if apart else _BLOCK)[inner]
  if axis >= 0:
    modules = modules[: shape[1 + axis]]  # a plain MLP has no fc3
  kind = "bias" if inner.endswith("/bias") else "weight"
  attn = "self_attn" if text else "attn"
  names = (f"{_MODEL}trunk.blocks.{i}.{module.format(attn=attn)}.{kind}" for i in range(shape[0]) for module in modules)
  return Entry(path, shape, tuple(names), layout, True, len(modules), axis)


def _read(file: TensorFile, config: ConfigDict, multiplier: float, mesh: jax.sharding.Mesh | None) -> dict:
  """Returns the parameters that config asks for, from the file's tensors."""
  try:
    abstract, _ = jax.eval_shape(stages.make_stage(config).init, jax.random.key(0))
  except ValueError as e:
    raise ValueError(f"{file.path}: {e}") from None
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: device, unbox(abstract))
  else:
    shardings = sharding.tree_shardings(abstract, mesh)
  shapes = {path: x.shape for path, x in flatten_dict(unbox(abstract), sep="/").items()}
  shardings = flatten_dict(shardings, sep="/")
  apart = f"{_MODEL}trunk.blocks.0.attn.q_proj.weight" in file.shapes
  entries = [_entry(path, shape, config.ar.condition == "text", apart) for path, shape in shapes.items()]
  # Of layers that never have a bias where others have one, it is zero.
  absent = {e.path for e in entries if _is_linear_bias(e) and not any(name in file.shapes for name in e.names)}
  wanted = [name for e in entries if e.path not in absent for name in e.names]
  unused = (f"{_MODEL}preprocessor.positional_embedding",) if config.ar.pos_embed == "sincos1d" else ()
  tensor_file.check_names(file.path, file.shapes, wanted, unused)
  for e in entries:
    for name in e.names if e.path not in absent else ():
      if file.shapes[name] != e.official_shape:
        raise ValueError(
          f"{file.path}: {name} has shape {list(file.shapes[name])}, the other weights ask for {list(e.official_shape)}"
        )
  flat = {}
  for e in sorted(entries, key=lambda e: -np.prod(e.shape)):  # the largest first: where jax copies, it is alone
    array = tensor_file.empty(e.shape, jnp.dtype(config.dtype))
    for i, name in enumerate(e.names):
      if e.path in absent:
        e.view(array, i)[...] = 0
        continue
      tensor = file.read(name)
      if e.path == "ar/readout/kernel" and multiplier != 1:
        tensor = tensor.astype(np.float32) * np.float32(multiplier)
      e.from_official(tensor, array, i)
    flat[e.path] = jax.block_until_ready(jax.device_put(array, shardings[e.path]))
    del array
  return unflatten_dict({path: flat[path] for path in shapes}, sep="/")


def _is_linear_bias(entry: Entry) -> bool:
  return entry.names[0].endswith(sum(_BIASES.values(), ()) + (".Wk.bias",))
