"""Loads the authors' generators (FlexAR) from safetensors files with the names of their framework.

Names and shapes of the weights determine most of a model's settings. The user's settings and a configuration file
(generator_config.py) supply the others, and must not contradict the weights.
"""

from collections.abc import Mapping
import itertools
import math
import os

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax import stages
from flextok_jax.config import derive, float_dtype
from flextok_jax.core import accelerators, tensor_file
from flextok_jax.core.tensor_file import TensorFile, Tensors, named
from flextok_jax.models.ar.generator import sincos_table
from flextok_jax.stages.ar import mlp_hidden
from flextok_jax.weights import layout
from flextok_jax.weights.folder import Folder, describe_others, has_weights
from flextok_jax.weights.official import generator_config, generator_names
from flextok_jax.weights.official.generator_names import BIASES, BLOCKS, MODEL, POSITIONS, READOUT, TEXT_MLP
from flextok_jax.weights.official.generator_settings import Settings

CONFIGS = ("config.yaml", "config.yml", "config.json")
_IGNORED = ("models.text_encoder.t5_embedder.", "models.image_tokenizer.")  # parts that are loaded on their own
_GUIDANCE = {"class": 1.5, "text": 3.0, "none": 1.0}  # the authors' scales


def load(
  source: str | os.PathLike,
  settings: Mapping[str, object],
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  revision: str | None = None,
  subfolder: str = "",
) -> tuple[ConfigDict, dict]:
  """Loads a generator in the authors' format.

  Args:
    source: a .safetensors file; a folder with one, and perhaps a config.yaml, config.yml or config.json (the first of
      these is read); or a repository of the Hugging Face hub with config.yaml and model.safetensors.
    settings: known settings of the model. All are optional; those that the weights or the configuration determine must
      agree with them. Determined by the weights: dim, depth, vocab (number of ids), num_tokens, num_classes (None:
      none), cross (conditioned on text), bias (of all linear layers), norm and qk_norm ("layernorm", "rmsnorm"; qk_norm
      also None), ffn ("mlp_gelu", "swiglu"), head_layernorm, text_dim. head_dim: determined if there is a qk_norm, else
      64 [paper]. pos_embed ("absolute", "sincos1d", "sincos2d"): a stored table that equals the sincos1d table is
      computed, any other is a parameter. mlp_ratio, ffn_multiple_of: any that give the hidden width of the weights.
      norm_eps, qk_norm_eps: 1e-5 of a layernorm and 1e-6 of an rmsnorm. readout_multiplier, or mup_base_width for
      base / dim: 1, as it is part of the released weights. text_len: 120 tokens per text at most. text_encoder: folder
      or repository of the T5, google/flan-t5-xl; only this one may differ from the configuration's.
    dtype: type of parameters and computation; None: float32, as in the authors' code.
    mesh: devices to place the arrays on by their logical axes; None: the default device.
    revision: branch, tag or commit of a repository; None: the main branch.
    subfolder: of the folder or repository.

  Returns:
    (config, params): a config of stage "ar"; trees "ar" and, if the model is conditioned on text, "text_mlp". The
    readout's multiplier is part of its kernel. If only some layers have a bias, the others have zeros.

  Raises:
    FileNotFoundError: the source does not exist, or cannot be downloaded.
    ValueError: a damaged, foreign or unsupported file, an unknown setting, or a contradiction; it names both sides.
  """
  accelerators.start()
  param_dtype = jnp.dtype(float_dtype("dtype", dtype or "float32"))
  file, config_file = _find(os.fspath(source), revision, subfolder)
  found = Settings()
  found.add_all(settings, "the settings")
  if config_file:
    generator_config.add_file(found, config_file)
  with named(file.path):
    _add_weights(found, file)
    computed_positions = _positions_are_computed(found, file)
    config = _make_config(found, file, param_dtype.name, "sincos1d" if computed_positions else "absolute")
    multiplier = _readout_multiplier(found)
    try:
      boxed, _ = jax.eval_shape(stages.make_stage(config).init, jax.random.key(0))
    except ValueError as e:
      raise ValueError(f"its settings describe no model: {e}") from None
    unused = (POSITIONS,) if computed_positions else ()
  return config, _read(file, boxed, param_dtype, multiplier, mesh, unused)


def _find(source: str, revision: str | None, subfolder: str) -> tuple[Tensors, str | None]:
  """Returns the weights and the path of the configuration file, which may be None."""
  if os.path.isfile(source):
    return TensorFile(source, _IGNORED), None
  if os.path.isdir(source) and subfolder:
    source, subfolder = os.path.join(source, subfolder), ""
  folder = Folder(source, "generator", "organisation/name", subfolder, CONFIGS[0], revision)
  if not os.path.isdir(source):
    return folder.tensors(_IGNORED), folder.find(CONFIGS[0])
  config = next((path for name in CONFIGS if os.path.isfile(path := os.path.join(source, name))), None)
  if has_weights(source):
    return folder.tensors(_IGNORED), config
  weights = sorted(name for name in os.listdir(source) if name.endswith(".safetensors"))
  if not weights:
    others = describe_others(source)
    raise FileNotFoundError(f"folder {source} holds no generator: no .safetensors file in it{others}")
  if len(weights) > 1:
    raise ValueError(f"folder {source} holds several .safetensors files ({', '.join(weights)[:120]}): give one")
  return TensorFile(os.path.join(source, weights[0]), _IGNORED), config


def _shape(file: Tensors, name: str, rank: int) -> tuple[int, ...]:
  if name not in file.shapes:
    raise ValueError(f"it lacks the tensor {name}, which every generator in this format has")
  if len(file.shapes[name]) != rank:
    raise ValueError(f"{name} has shape {list(file.shapes[name])}, expected {rank} axes")
  return file.shapes[name]


def _add_weights(found: Settings, file: Tensors):
  """Adds the settings that names and shapes of the weights determine."""
  add = lambda name, value: found.add(name, value, "the weights")
  names = file.shapes
  if not any(name.startswith(MODEL) for name in names):
    raise ValueError(f"no generator in the authors' format: none of its tensors begins with {MODEL}")
  shape = lambda name, rank: _shape(file, f"{MODEL}{name}", rank)
  ids, width = shape("preprocessor.embedding.weight", 2)
  add("vocab", ids)
  add("dim", width)
  add("num_tokens", _shape(file, POSITIONS, 2)[0])
  found.add("vocab", _shape(file, READOUT, 2)[0], "the weights' head.linear")
  shape("trunk.post_trunk_norm.weight", 1)  # a model without it would be another
  add("depth", layout.count_series(names, f"{BLOCKS}."))

  # The kinds of layers, from the first block.
  block = f"{BLOCKS}.0."
  text = any(name.startswith(f"{block}cross_attn.") for name in names)
  add("cross", text)
  classes = f"{MODEL}preprocessor.cls_embedding.weight"
  if text and classes in names:
    raise ValueError(f"it has both {classes} and {block}cross_attn: conditioned on classes or on texts, not on both")
  add("num_classes", _shape(file, classes, 2)[0] if classes in names else None)
  norm_kind = lambda name: "layernorm" if f"{name}.bias" in names else "rmsnorm"
  add("norm", norm_kind(f"{block}norm_1"))
  q_norm = f"{block}{'self_attn' if text else 'attn'}.q_norm"
  if f"{q_norm}.weight" in names:
    add("qk_norm", norm_kind(q_norm))
    add("head_dim", _shape(file, f"{q_norm}.weight", 1)[0])
  else:
    add("qk_norm", "none")
  add("ffn", "swiglu" if f"{block}mlp.fc3.weight" in names else "mlp_gelu")
  add("head_layernorm", f"{MODEL}head.norm.weight" in names)
  for layer, endings in BIASES.items():
    add(layer, any(name.startswith(MODEL) and name.endswith(endings) for name in names))
  if text:
    add("text_dim", _shape(file, f"{TEXT_MLP}fc1.weight", 2)[1])


def _positions_are_computed(found: Settings, file: Tensors) -> bool:
  """Whether the stored position table equals the sincos1d table, so that it is computed and no parameter."""
  kind, shape = found.get("pos_embed"), _shape(file, POSITIONS, 2)
  if kind in ("absolute", "sincos2d"):
    return False
  if shape[1] != found.get("dim"):
    raise ValueError(f"{POSITIONS} has shape {list(shape)}, but dim is {found.get('dim')} in {found.origin('dim')}")
  gap = layout.table_error(file, POSITIONS, sincos_table(*shape)) if shape[1] % 4 == 0 else math.inf
  if kind == "sincos1d" and gap:
    raise ValueError(
      f"pos_embed is 'sincos1d' in {found.origin('pos_embed')}, but the table in the weights differs by "
      f"{gap:.2g} from it"
    )
  return not gap


def _readout_multiplier(found: Settings) -> float:
  if "mup_base_width" in found:
    multiplier = found.get("mup_base_width") / found.get("dim")
    found.add("readout_multiplier", multiplier, f"{found.origin('mup_base_width')} (mup_base_width / dim)")
  return found.get("readout_multiplier", 1.0)


def _make_config(found: Settings, file: Tensors, dtype: str, pos_embed: str) -> ConfigDict:
  """Returns the config of the settings; the hidden width of the MLP comes from the file."""
  condition = "text" if found.get("cross") else "class" if found.get("num_classes") else "none"
  config = derive(stage="ar", dtype=dtype)
  config.ar.update(
    width=found.get("dim"),
    depth=found.get("depth"),
    head_dim=found.get("head_dim", 64),
    num_ids=found.get("vocab"),
    num_tokens=found.get("num_tokens"),
    condition=condition,
    num_classes=found.get("num_classes") or 1000,
    norm=found.get("norm"),
    norm_eps=float(found.get("norm_eps", 0)),
    qk_norm=found.get("qk_norm"),
    qk_norm_eps=float(found.get("qk_norm_eps", 0)),
    ffn=found.get("ffn"),
    bias=any(found.get(layer) for layer in BIASES),
    pos_embed=pos_embed,
    head_layernorm=found.get("head_layernorm"),
    guidance_scale=float(found.get("guidance_scale", _GUIDANCE[condition])),
    temperature=float(found.get("temperature", 1)),
    top_k=found.get("top_k", 0),
    top_p=float(found.get("top_p", 0)),
  )
  config.text.update(
    max_length=found.get("text_len", 120),
    path=found.get("text_encoder", "google/flan-t5-xl"),
    features=found.get("text_dim", 2048),
    mlp_hidden=_shape(file, f"{TEXT_MLP}fc1.weight", 2)[0] if condition == "text" else 2048,
  )
  width, head_dim = config.ar.width, config.ar.head_dim
  if not head_dim or width % head_dim:
    origin = found.origin("head_dim") if "head_dim" in found else "the default"
    raise ValueError(f"head_dim {head_dim} ({origin}) does not divide dim {width} of the weights: set head_dim")
  _set_hidden(found, config.ar, _shape(file, f"{BLOCKS}.0.mlp.fc1.weight", 2)[0])
  return config.lock()


def _set_hidden(found: Settings, c: ConfigDict, hidden: int):
  """Sets c.mlp_ratio and c.ffn_multiple_of as found, or such that the MLP has the hidden width of the weights."""
  exact = (hidden if c.ffn == "mlp_gelu" else (3 * hidden + 1) // 2) / c.width
  ratios = [4.0, exact, math.nextafter(exact, math.inf)]
  multiples = [64, 256, 128, 32, 16, 8, 4, 2, 1]
  if "mlp_ratio" in found:
    ratios = [float(found.get("mlp_ratio"))]
  if "ffn_multiple_of" in found:
    multiples = [found.get("ffn_multiple_of")]
  for c.mlp_ratio, c.ffn_multiple_of in itertools.product(ratios, multiples):
    if mlp_hidden(c) == hidden:
      return
  given = " and ".join(
    f"{name} {found.get(name)} in {found.origin(name)}" for name in ("mlp_ratio", "ffn_multiple_of") if name in found
  )
  raise ValueError(f"the MLP's hidden width is {hidden} in the weights, which contradicts {given}")


def _read(
  file: Tensors,
  boxed: dict,
  dtype: np.dtype,
  multiplier: float,
  mesh: jax.sharding.Mesh | None,
  unused: tuple[str, ...],
) -> dict:
  """Reads the parameters from a file that must have their tensors and no others.

  Args:
    file: with the tensors.
    boxed: shapes of the parameters, boxed with their logical axes.
    dtype: of all arrays.
    multiplier: of the readout's kernel.
    mesh: devices to place the arrays on; None: the default device.
    unused: names of tensors that the file may have besides.
  """
  shapes = layout.shapes_of(boxed)
  text = "text_mlp/in/kernel" in shapes
  separate_qkv = f"{BLOCKS}.0.attn.q_proj.weight" in file.shapes
  entries = [generator_names.entry(path, shape, text, separate_qkv) for path, shape in shapes.items()]
  # A bias that no block has is zero if other layers have one.
  absent = {
    name: e.official_shape
    for e in entries
    if generator_names.is_linear_bias(e) and not any(name in file.shapes for name in e.names)
    for name in e.names
  }

  # Check everything before reading.
  wanted = [(e, name) for e in entries for name in e.names if name not in absent]
  tensor_file.check_names(file.path, file.shapes, [name for _, name in wanted], unused)
  with named(file.path):
    for e, name in wanted:
      e.check_shape(name, file.shapes[name])

  def read(name: str) -> np.ndarray:
    if name in absent:
      return np.zeros(absent[name], np.float32)
    tensor = file.read(name)
    if name == READOUT and multiplier != 1:
      return tensor.astype(np.float32) * np.float32(multiplier)
    return tensor

  with named(file.path):
    return layout.read_arrays(entries, read, lambda path: dtype, layout.placements(boxed, mesh))
