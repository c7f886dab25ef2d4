"""Files of the authors' generators with random weights: an independent implementation of their format."""

import functools

from flax.core.meta import unbox
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flextok_jax import config as common
from flextok_jax import stages
from flextok_jax.weights.official import generator

MODEL = "models.ar_image_model."
BLOCK = f"{MODEL}trunk.blocks.0."
TINY = dict(width=16, depth=2, head_dim=8, num_ids=20, num_tokens=8, num_classes=3)
CHOICES = {  # our settings, and those that the weights alone do not determine
  "class": (dict(norm="layernorm", qk_norm="layernorm", ffn="mlp_gelu"), {}),
  "class_apart": (dict(norm="layernorm", qk_norm="rmsnorm", ffn="mlp_gelu", bias=True), {}),
  "gated": (
    dict(
      norm="rmsnorm",
      qk_norm="none",
      ffn="swiglu",
      bias=True,
      pos_embed="sincos1d",
      head_layernorm=True,
      ffn_multiple_of=8,
    ),
    dict(head_dim=8, ffn_multiple_of=8),
  ),
  "text": (
    dict(
      norm="rmsnorm", qk_norm="rmsnorm", ffn="swiglu", condition="text", bias=True, mlp_ratio=2.0, ffn_multiple_of=1
    ),
    {},
  ),
  "none": (dict(norm="layernorm", qk_norm="none", ffn="mlp_gelu", condition="none", mlp_ratio=3.0), dict(head_dim=8)),
}


def tiny_config(name):
  text = dict(features=6, mlp_hidden=10) if CHOICES[name][0].get("condition") == "text" else {}
  return common.derive(stage="ar", dtype="float32", ar=TINY | CHOICES[name][0], text=text)


def abstract(config):
  return unbox(jax.eval_shape(stages.make_stage(config).init, jax.random.key(0))[0])


def random_params(config):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract(config))


def sincos(length, width):
  """The fixed table, implemented independently: position i > 0 encodes i - 1; half of the width encodes nothing."""
  table = np.zeros((length, width), np.float32)
  for i in range(1, length):
    for j in range(width // 4):
      angle = (i - 1) / 10000 ** (j / (width // 4))
      table[i, [width // 4 + j, width // 2 + j, 3 * width // 4 + j]] = 1, np.sin(angle), np.cos(angle)
  return table


def to_official(params, config, apart=False):
  """Returns our arrays with the authors' names and layouts."""
  c, ar, out = config.ar, params["ar"], {}
  put = lambda name, x: out.__setitem__(name, np.ascontiguousarray(x))

  def norm(name, x):
    put(f"{name}.weight", x["scale"])
    if "bias" in x:
      put(f"{name}.bias", x["bias"])

  def linear(name, kernel, bias=None, inputs=1):
    """kernel [inputs..., outputs...]."""
    put(f"{name}.weight", kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1).T)
    if bias is not None:
      put(f"{name}.bias", bias.reshape(-1))

  put(f"{MODEL}preprocessor.embedding.weight", ar["embedding"])
  put(f"{MODEL}preprocessor.sos_token_embed", ar["start"][None, None])
  put(f"{MODEL}preprocessor.positional_embedding", ar.get("positions", sincos(c.num_tokens, c.width)))
  if "class_embedding" in ar:
    put(f"{MODEL}preprocessor.cls_embedding.weight", ar["class_embedding"])
  norm(f"{MODEL}trunk.post_trunk_norm", ar["norm"])
  if "head_norm" in ar:
    norm(f"{MODEL}head.norm", ar["head_norm"])
  linear(f"{MODEL}head.linear", ar["readout"]["kernel"], ar["readout"].get("bias"))
  if "text_mlp" in params:
    linear("models.text_encoder.mlp.fc1", params["text_mlp"]["in"]["kernel"])
    linear("models.text_encoder.mlp.fc2", params["text_mlp"]["out"]["kernel"])
  for i in range(c.depth):
    block = jax.tree.map(lambda x: x[i], ar["blocks"])  # noqa: B023 used at once
    name = f"{MODEL}trunk.blocks.{i}."
    attn = f"{name}{'self_attn' if c.condition == 'text' else 'attn'}"
    for n in range(1, 4 if c.condition == "text" else 3):
      norm(f"{name}norm_{n}", block[f"norm_{n}"])
    for prefix, part in ((attn, block["attention"]), (f"{name}cross_attn", block.get("cross"))):
      if part is not None:
        linear(f"{prefix}.proj", part["out"]["kernel"], part["out"].get("bias"), inputs=2)
        for which in ("q_norm", "k_norm") if c.qk_norm != "none" else ():
          norm(f"{prefix}.{which}", part[which])
    qkv = block["attention"]["qkv"]
    if apart:
      for j, which in enumerate("qkv"):
        linear(f"{attn}.{which}_proj", qkv["kernel"][:, j], qkv["bias"][j] if "bias" in qkv else None)
    else:
      linear(f"{attn}.qkv", qkv["kernel"], qkv.get("bias"))
    if "cross" in block:
      q, kv = block["cross"]["q"], block["cross"]["kv"]
      linear(f"{name}cross_attn.Wq", q["kernel"], q.get("bias"))
      for j, which in enumerate("kv"):
        linear(f"{name}cross_attn.W{which}", kv["kernel"][:, j], kv["bias"][j] if "bias" in kv else None)
    for ours, official in (("in", "fc1"), ("gate", "fc3"), ("out", "fc2")):
      if layer := block["mlp"].get(ours):
        linear(f"{name}mlp.{official}", layer["kernel"], layer.get("bias"))
  return out


@functools.cache
def _made(name):
  config = tiny_config(name)
  params = random_params(config)
  return params, to_official(params, config, apart=name == "class_apart")


def tensors(name):
  """Returns our random parameters of one of CHOICES, and the authors' tensors."""
  params, official = _made(name)
  return params, {k: v.copy() for k, v in official.items()}


def write(path, official, dtype=np.float32):
  save_file({k: v.astype(dtype) for k, v in official.items()}, path)
  return str(path)


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def error(source, **settings):
  with pytest.raises(ValueError) as e:
    generator.load(source, settings)
  text = str(e.value)
  assert "\n" not in text and str(source) in text
  return text.replace(str(source), "")  # a temporary path may contain any word


SETTINGS = dict(
  dim=16,
  head_dim=8,
  depth=2,
  vocab=20,
  num_tokens=8,
  num_classes=3,
  cross=False,
  bias=False,
  norm="layernorm",
  qk_norm="layernorm",
  ffn="mlp_gelu",
  mlp_ratio=4,
  pos_embed="absolute",
  head_layernorm=False,
)

# Config files of the authors, without fields that the reader's tables do not name.
TEXT_YAML = """
constants: {dim: 16, depth: "${div_int:${constants.dim},8}", norm: {_target_: l3m.model.layers.normalization.RMSNorm,
  _partial_: true, eps: 1e-6}}
optim: {param: mup, muP_base_dim: 8, lr: 1e-3}
generation: {model_type: ar_text_to_image_model, cfg_factor: 4.5, temperature: 0.9, top_k: 7, top_p: 0.5, sample: true}
model:
  meta_model:
    _target_: l3m.model.meta_models.InSeriesMetaModels
    models:
      image_tokenizer: {_target_: os.system, command: "touch CANARY"}
      text_encoder:
        _target_: flextok_ar.model.text_encoder.T5EmbedderWithMLP
        t5_embedder:
          _target_: flextok_ar.model.text_encoder.T5Embedder
          read_key: text
          text_embeddings_write_key: text_embeddings
          text_embeddings_mask_write_key: text_mask
          hf_hub_path: google/flan-t5-base
          encoder_seqlen_max: 12
          decoder_seqlen: 8
          cond_dropout_p: 0.1
        mlp:
          _target_: flextok_ar.model.text_encoder.TextToEmbedMLP
          text_dim: 6
          embed_dim: ${constants.dim}
          act_layer: {_target_: torch.nn.GELU, _partial_: true, approximate: tanh}
      ar_image_model:
        _target_: l3m.model.meta_models.MetaModel
        preprocessor:
          _target_: flextok_ar.model.preprocessors.ARImageEmbedPreprocessor
          token_grid_size: [8, 1]
          codebook_size: 20
          embed_dim: ${constants.dim}
          pos_embed_type: absolute
          init_style: uniform
          read_key: image_token_ids
          write_key: [input_embeddings, target_token_ids]
        trunk:
          _target_: l3m.model.trunks.transformer_decoder.TransformerDecoder
          encoder_output_key: text_embeddings
          self_attn_mask_read_key: text_mask
          embed_dim: ${constants.dim}
          num_blocks: ${constants.depth}
          mlp_ratio: 2
          use_bias: true
          post_trunk_norm: true
          norm_layer: ${constants.norm}
          weight_init_style: fan_in_depth_scaled
          ffn_target: {_target_: l3m.model.layers.ffn.SwiGLUFFN, _partial_: true, multiple_of: 1}
          self_attn_target:
            _target_: l3m.model.layers.attention.EfficientAttention
            _partial_: true
            dim: ${constants.dim}
            num_heads: ${div_int:${constants.dim},8}
            qkv_bias: true
            is_causal: true
            qk_norm: ${constants.norm}
          cross_attn_target:
            _target_: flextok_ar.model.attention.GeneralizedAttentionWithMask
            _partial_: true
            dim: ${constants.dim}
            encoder_dim: ${constants.dim}
            num_heads: 2
            qkv_bias: true
            qk_norm: ${constants.norm}
        postprocessor: {_target_: torch.nn.Identity}
        head: {_target_: l3m.model.heads.classifier.LinearClassifier, in_features: 16, out_features: 20, use_bias: true}
"""
CLASS_YAML = """
model:
  meta_model:
    _target_: l3m.model.meta_models.InSeriesMetaModels
    models:
      ar_image_model:
        _target_: l3m.model.meta_models.MetaModel
        preprocessor:
          _target_: flextok_ar.model.preprocessors.ARImageEmbedPreprocessor
          token_grid_size: [8, 1]
          codebook_size: 20
          embed_dim: 16
          pos_embed_type: absolute
          num_classes: 3
          cond_dropout_prob: 0.1
        trunk:
          _target_: l3m.model.trunks.transformer.Transformer
          embed_dim: 16
          num_blocks: 2
          use_bias: false
          post_trunk_norm: true
          act_layer: {_target_: torch.nn.GELU, _partial_: true}
          attn_target:
            _target_: l3m.model.layers.attention.EfficientAttention
            _partial_: true
            dim: 16
            num_heads: 2
            is_causal: true
            qk_norm: {_target_: l3m.model.layers.normalization.LayerNormFP32, _partial_: true, eps: 1e-5}
        head: {_target_: l3m.model.heads.LinearClassifier, in_features: 16, out_features: 20, use_bias: false}
"""


def text_yaml(old="", new=""):
  assert old in TEXT_YAML
  return TEXT_YAML.replace(old, new, 1) if old else TEXT_YAML


def class_yaml(old, new):
  assert old in CLASS_YAML
  return CLASS_YAML.replace(old, new, 1)
