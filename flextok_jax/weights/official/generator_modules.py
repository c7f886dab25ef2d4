"""The authors' configuration of a generator: nested constructor calls, checked against a whitelist.

The tables hold the classes of a generator and its text encoder, with their arguments, defaults and supported values.
Listed arguments without effect on inference are ignored; everything else is refused by name.
"""

from collections.abc import Callable, Mapping
import itertools
import math
from typing import Any

from flextok_jax.core.literals import quote
from flextok_jax.weights.official.generator_settings import COUNT, DEPTH, POSITIONS, RATIO, Settings
from flextok_jax.weights.official.modules import (
  ENTRY,
  FLAG,
  GETTERS,
  SIZE,
  TEXT,
  Arguments,
  Kind,
  Module,
  exactly,
  integer,
  listed,
  number,
  optional,
  read,
  read_activation,
)

# Per class: argument -> (kind,), or (kind, the constructor's default) if it may be left out.
_ANY = (Kind("anything", lambda v: True), None)  # without effect on inference
_KEYS = dict.fromkeys(("read_key", "write_key"), _ANY)
_OPTIONAL_ENTRY = (optional(ENTRY), None)
_ABSENT = (exactly(None), None)


def _table(module: str, classes: Mapping[str, Arguments]) -> dict[str, Arguments]:
  """Returns {_target_: arguments} of classes in a module, also under the packages that may export them."""
  scopes = itertools.accumulate(module.split("."), lambda a, b: f"{a}.{b}")
  return {f"{scope}.{name}": arguments for scope in scopes for name, arguments in classes.items()}


_IDENTITY = _table("torch.nn.modules.linear", {"Identity": {}})
_MODELS = _table("l3m.model.meta_models", {"InSeriesMetaModels": _KEYS | dict(models=(ENTRY,), order=_ANY)})
_MODEL = _table(
  "l3m.model.meta_models",
  {"MetaModel": _KEYS | dict(preprocessor=(ENTRY,), trunk=(ENTRY,), postprocessor=_OPTIONAL_ENTRY, head=(ENTRY,))},
)
_PREPROCESSOR = _table(
  "flextok_ar.model.preprocessors",
  {
    "ARImageEmbedPreprocessor": _KEYS
    | dict(
      token_grid_size=(listed(SIZE, 1, 2),),
      codebook_size=(COUNT,),
      embed_dim=(SIZE,),
      pos_embed_type=(POSITIONS, None),
      num_classes=(optional(COUNT), None),
      init_style=_ANY,
      cond_dropout_prob=_ANY,
      class_target_key=_ANY,
      inference_read_key=_ANY,
    )
  },
)
_TRUNK = _KEYS | dict(
  embed_dim=(SIZE,),
  num_blocks=(DEPTH,),
  ffn_target=(ENTRY, {"_target_": "l3m.model.layers.ffn.MLP", "_partial_": True}),
  act_layer=_OPTIONAL_ENTRY,
  block=_OPTIONAL_ENTRY,
  norm_layer=(ENTRY, {"_target_": "l3m.model.layers.normalization.LAYER_NORM", "_partial_": True}),
  mlp_ratio=(RATIO, 4),
  mlp_hidden_dim=(optional(SIZE), None),
  use_bias=(FLAG, True),
  post_trunk_norm=(exactly(True), False),
  self_attn_mask_read_key=_ANY,
  drop_path_rate=_ANY,
  drop_path_type=_ANY,
  ffn_dropout_rate=_ANY,
  weight_init_style=_ANY,
  gpt_proj_rescale=_ANY,
)
_CLASS_TRUNK = _table("l3m.model.trunks.transformer", {"Transformer": _TRUNK | dict(attn_target=(ENTRY,))})
_TEXT_TRUNK = _table(
  "l3m.model.trunks.transformer_decoder",
  {
    "TransformerDecoder": _TRUNK
    | dict(
      self_attn_target=(ENTRY,),
      cross_attn_target=(ENTRY,),
      encoder_output_key=(TEXT,),
      self_attn_mask_read_key=(TEXT,),  # mask of the text's padding, without which the trunk attends to it
    )
  },
)
_CLASS_BLOCK = _table("l3m.model.trunks.transformer", {"Block": {}})
_TEXT_BLOCK = _table("l3m.model.trunks.transformer_decoder", {"DecoderBlock": {}})
_ATTENTION = dict(
  dim=(SIZE,),
  num_heads=(SIZE, 8),
  qkv_bias=(FLAG, False),
  qk_scale=_ABSENT,
  qk_norm=_OPTIONAL_ENTRY,
  attn_drop=_ANY,
  proj_drop=_ANY,
  use_bias=_ANY,  # the trunk's has effect
)
_CAUSAL = _ATTENTION | dict(is_causal=(exactly(True), False))
_EFFICIENT = {"EfficientAttention": _CAUSAL | dict(rope_pos_embed=_ABSENT)}
_SELF_ATTENTION = _table("l3m.model.layers.attention", _EFFICIENT)
_CLASS_ATTENTION = _table(
  "l3m.model.layers.attention",
  _EFFICIENT
  | {
    "GenericAttention": _CAUSAL
    | dict(rope=_ABSENT, head_dim=(optional(SIZE), None), num_kv_heads=(optional(SIZE), None), use_flex_attention=_ANY)
  },
)
_CROSS_ATTENTION = _table(
  "flextok_ar.model.attention",
  {
    "GeneralizedAttentionWithMask": _ATTENTION
    | dict(encoder_dim=(SIZE,), is_causal=(exactly(False), False), relative_pos_embed=_ABSENT)
  },
)
_MLP = dict(act_layer=_OPTIONAL_ENTRY, drop=_ANY, norm_layer=_ABSENT)
_FFNS = _table("l3m.model.layers.ffn", {"MLP": _MLP, "SwiGLUFFN": dict(act_layer=_ANY, multiple_of=(SIZE, 256))})
_EPS = number(1e-12, 1)
_AFFINE = dict(eps=(_EPS, 1e-5), elementwise_affine=(exactly(True), True), bias=(exactly(True), True))
_NORMS = _table("torch.nn.modules.normalization", {"LayerNorm": _AFFINE}) | _table(
  "l3m.model.layers.normalization",
  {
    "LayerNormFP32": _AFFINE,
    "LAYER_NORM": _AFFINE | dict(eps=(_EPS, 1e-6)),
    "LPLayerNorm": dict(
      eps=(_EPS, 1e-5), elementwise_gain=(exactly(True), True), elementwise_bias=(exactly(True), True)
    ),
    "RMSNorm": dict(eps=(_EPS, 1e-6)),
  },
)
_HEAD = _table(
  "l3m.model.heads.classifier",
  {
    "LinearClassifier": _KEYS
    | dict(
      in_features=(SIZE,),
      out_features=(COUNT,),
      use_layernorm=(FLAG, False),
      use_batchnorm=(exactly(False), False),
      use_bias=(FLAG, True),
      weight_init_style=_ANY,
      encoder_num_blocks=_ANY,
      init_std=_ANY,
    )
  },
)
_TEXT_ENCODER = _table("flextok_ar.model.text_encoder", {"T5EmbedderWithMLP": dict(t5_embedder=(ENTRY,), mlp=(ENTRY,))})
_T5 = _table(
  "flextok_ar.model.text_encoder",
  {
    "T5Embedder": dict(
      text_embeddings_write_key=(TEXT,),
      text_embeddings_mask_write_key=(TEXT,),
      hf_hub_path=(TEXT, "google/flan-t5-xl"),
      encoder_seqlen_max=(optional(SIZE), None),
      read_key=_ANY,
      decoder_seqlen=_ANY,
      cond_dropout_p=_ANY,
    )
  },
)
_TEXT_MLP = _table(
  "flextok_ar.model.text_encoder",
  {
    "TextToEmbedMLP": dict(
      text_dim=(SIZE,), embed_dim=(SIZE,), act_layer=_OPTIONAL_ENTRY, use_bias=(exactly(False), False)
    )
  },
) | _table(
  "l3m.model.layers.ffn",
  {
    "MLP": _MLP
    | dict(
      in_features=(SIZE,),
      hidden_features=(SIZE,),
      out_features=(SIZE,),
      act_layer=(ENTRY,),
      use_bias=(exactly(False), True),
    )
  },
)

# (field of the file's section `generation`, our field, what is supported)
_SAMPLING = (
  ("cfg_factor", "guidance_scale", number(0, 1e6)),
  ("temperature", "temperature", number(1e-6, 1e6)),
  ("top_k", "top_k", integer(0, 2**31 - 1)),
  ("top_p", "top_p", number(0, 1)),
)
_PATH = "model.meta_model"
_GENERATOR = f"{_PATH}.models.ar_image_model"
_TEXT = f"{_PATH}.models.text_encoder"
_MODEL_NAMES = ("ar_image_model", "text_encoder", "image_tokenizer")  # the last is ignored


def add_calls(settings: Settings, document: Mapping[str, Any], resolve: Callable[[Any], Any]):
  """Adds the settings in model.meta_model, and the defaults of sampling in `generation`.

  Other sections concern training and are ignored, also a muP base width in `optim`: the authors' loader does not read
  it either, as the multiplier is part of the released weights.

  Args:
    settings: where to add them.
    document: plain data, the whole file.
    resolve: resolves interpolations in a part of it.

  Raises:
    ValueError: naming what is not supported, or contradicts settings that were added before.
  """
  model = document["model"]
  calls = model.get("meta_model") if isinstance(model, dict) else None
  if type(calls) is not dict:
    raise ValueError(f"{_PATH} is missing")
  models = read(calls, _PATH, _MODELS)["models"]
  for name in models:
    if name not in _MODEL_NAMES:
      raise ValueError(f"{_PATH}.models has {quote(name)}: only {', '.join(_MODEL_NAMES)} are supported")
  if "ar_image_model" not in models:
    raise ValueError(f"{_GENERATOR} is missing")
  text = _add_text_encoder(settings, resolve(models["text_encoder"])) if "text_encoder" in models else None
  _add_generator(settings, resolve(models["ar_image_model"]), text)
  generation = document.get("generation")
  if not isinstance(generation, dict):
    return
  for name, ours, kind in _SAMPLING:
    value = resolve(generation.get(name))
    if value is not None:
      if not kind.accepts(value):
        raise ValueError(f"generation.{name} must be {kind.supported}, got {quote(value)}")
      settings.add(ours, value, f"generation.{name}")


def _add(settings: Settings, name: str, module: Module, argument: str, value: Any = None):
  """Adds the setting that a module's argument stands for; its value is that of the argument by default."""
  settings.add(name, module[argument] if value is None else value, f"{module.path}.{argument}")


def _read_factory(module: Module, argument: str, table: Mapping[str, Arguments]) -> Module:
  """Reads an argument that is a class: bound to some arguments (_partial_), or looked up by its path."""
  entry = module[argument]
  if entry.get("_target_") in tuple(GETTERS) and "path" in entry:
    entry = {"_target_": entry["path"], "_partial_": True}
  return read(entry, f"{module.path}.{argument}", table, partial=True)


def _add_text_encoder(settings: Settings, entry: Any) -> Module:
  """Adds the settings in the text encoder; returns its T5."""
  encoder = read(entry, _TEXT, _TEXT_ENCODER)
  t5 = read(encoder["t5_embedder"], f"{_TEXT}.t5_embedder", _T5)
  mlp = read(encoder["mlp"], f"{_TEXT}.mlp", _TEXT_MLP)
  features, width = ("in_features", "out_features") if mlp.name == "MLP" else ("text_dim", "embed_dim")
  _add(settings, "text_dim", mlp, features)
  _add(settings, "dim", mlp, width)
  if mlp["act_layer"]:
    activation = read_activation(mlp["act_layer"], f"{mlp.path}.act_layer")
    mlp.check(activation == "gelu_tanh", "act_layer", "a GELU with approximate: tanh")
  if t5["encoder_seqlen_max"]:
    _add(settings, "text_len", t5, "encoder_seqlen_max")
  if "text_encoder" not in settings:  # the user may have given another source
    _add(settings, "text_encoder", t5, "hf_hub_path")
  return t5


def _add_generator(settings: Settings, entry: Any, text: Module | None):
  model = read(entry, _GENERATOR, _MODEL)
  if model["postprocessor"]:
    read(model["postprocessor"], f"{_GENERATOR}.postprocessor", _IDENTITY)
  inputs = read(model["preprocessor"], f"{_GENERATOR}.preprocessor", _PREPROCESSOR)
  _add(settings, "vocab", inputs, "codebook_size")
  _add(settings, "dim", inputs, "embed_dim")
  _add(settings, "num_tokens", inputs, "token_grid_size", math.prod(inputs["token_grid_size"]))
  _add(settings, "num_classes", inputs, "num_classes")
  _add(settings, "pos_embed", inputs, "pos_embed_type")

  trunk = read(model["trunk"], f"{_GENERATOR}.trunk", _TEXT_TRUNK if text else _CLASS_TRUNK)
  part = lambda argument, table: _read_factory(trunk, argument, table)
  settings.add("cross", text is not None, f"{trunk.path}._target_")
  _add(settings, "dim", trunk, "embed_dim")
  _add(settings, "depth", trunk, "num_blocks")
  _add(settings, "proj_bias", trunk, "use_bias")
  _add(settings, "mlp_bias", trunk, "use_bias")
  if trunk["block"]:
    part("block", _TEXT_BLOCK if text else _CLASS_BLOCK)
  norm = part("norm_layer", _NORMS)
  _add(settings, "norm", trunk, "norm_layer", _norm_kind(norm))
  _add(settings, "norm_eps", norm, "eps", float(norm["eps"]))
  _add_ffn(settings, trunk, part("ffn_target", _FFNS))
  if text:
    _add_attention(settings, part("self_attn_target", _SELF_ATTENTION))
    cross = part("cross_attn_target", _CROSS_ATTENTION)
    _add(settings, "dim", cross, "encoder_dim")
    _add_attention(settings, cross)
    for argument, key in (
      ("encoder_output_key", "text_embeddings_write_key"),
      ("self_attn_mask_read_key", "text_embeddings_mask_write_key"),
    ):
      trunk.check(trunk[argument] == text[key], argument, f"{quote(text[key])}, which is {text.path}.{key}")
  else:
    _add_attention(settings, part("attn_target", _CLASS_ATTENTION))

  head = read(model["head"], f"{_GENERATOR}.head", _HEAD)
  _add(settings, "dim", head, "in_features")
  _add(settings, "vocab", head, "out_features")
  _add(settings, "head_layernorm", head, "use_layernorm")
  _add(settings, "head_bias", head, "use_bias")


def _add_ffn(settings: Settings, trunk: Module, ffn: Module):
  gated = ffn.name == "SwiGLUFFN"
  _add(settings, "ffn", trunk, "ffn_target", "swiglu" if gated else "mlp_gelu")
  if gated:
    _add(settings, "ffn_multiple_of", ffn, "multiple_of")
  elif trunk.name == "Transformer" and trunk["act_layer"]:  # the text trunk always uses the exact GELU
    activation = read_activation(trunk["act_layer"], f"{trunk.path}.act_layer")
    trunk.check(activation == "gelu", "act_layer", "the exact GELU")
  if trunk["mlp_hidden_dim"]:
    _add(settings, "mlp_ratio", trunk, "mlp_hidden_dim", trunk["mlp_hidden_dim"] / trunk["embed_dim"])
  else:
    _add(settings, "mlp_ratio", trunk, "mlp_ratio")


def _add_attention(settings: Settings, attention: Module):
  heads, width = attention["num_heads"], attention["dim"]
  _add(settings, "dim", attention, "dim")
  _add(settings, "qkv_bias", attention, "qkv_bias")
  attention.check(width % heads == 0, "num_heads", f"a divisor of dim, {width}")
  _add(settings, "head_dim", attention, "num_heads", attention.arguments.get("head_dim") or width // heads)
  if attention.arguments.get("num_kv_heads"):
    attention.check(attention["num_kv_heads"] == heads, "num_kv_heads", f"num_heads, {heads}")
  if not attention["qk_norm"]:
    _add(settings, "qk_norm", attention, "qk_norm", "none")
    return
  norm = _read_factory(attention, "qk_norm", _NORMS)
  _add(settings, "qk_norm", attention, "qk_norm", _norm_kind(norm))
  _add(settings, "qk_norm_eps", norm, "eps", float(norm["eps"]))


def _norm_kind(norm: Module) -> str:
  return "rmsnorm" if norm.name == "RMSNorm" else "layernorm"
