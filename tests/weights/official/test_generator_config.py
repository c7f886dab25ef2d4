"""Config files of the authors' generators."""

import json

import pytest

from flextok_jax.weights.official import generator, generator_config
from tests.support.official_generator_files import (
  CLASS_YAML,
  SETTINGS,
  assert_same,
  class_yaml,
  error,
  tensors,
  text_yaml,
  write,
)


def test_load_from_the_hub(tmp_path, monkeypatch):
  params, official = tensors("text")
  write(tmp_path / "model.safetensors", official)
  (tmp_path / "config.yaml").write_text(text_yaml())
  monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name, **kwargs: str(tmp_path / name))
  config, loaded = generator.load("authors/generator", {})
  assert_same(loaded, params)
  assert config.text.max_length == 12


@pytest.mark.parametrize("name", ["config.yaml", "config.yml"])
def test_config_file(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  params, official = tensors("text")
  write(tmp_path / "model.safetensors", official)
  (tmp_path / name).write_text(text_yaml())
  config, loaded = generator.load(tmp_path, {})
  assert_same(loaded, params)  # the readout is unchanged, since released weights include the multiplier
  c = config.ar
  assert (c.norm_eps, c.mlp_ratio, c.ffn_multiple_of, c.head_dim) == (1e-6, 2.0, 1, 8)
  assert (c.guidance_scale, c.temperature, c.top_k, c.top_p) == (4.5, 0.9, 7, 0.5)
  assert (config.text.max_length, config.text.path) == (12, "google/flan-t5-base")
  assert generator.load(tmp_path, dict(text_encoder="/here"))[0].text.path == "/here"
  assert not (tmp_path / "CANARY").exists()


def test_config_file_with_defaults(tmp_path):
  """Missing settings have the defaults of the authors' constructors."""
  params, official = tensors("class")
  write(tmp_path / "model.safetensors", official)
  (tmp_path / "config.yaml").write_text(CLASS_YAML)
  config, loaded = generator.load(tmp_path, {})
  assert_same(loaded, params)
  assert config.ar.norm_eps == 1e-6  # of layer norms in their trunks
  assert config.ar.ffn == "mlp_gelu"


@pytest.mark.parametrize(
  "content,name",
  [(json.dumps(SETTINGS), "config.json"), ("dim: 16\nnorm_eps: 0\nqk_norm: layernorm\n", "config.yaml")],
  ids=["json", "yaml"],
)
def test_flat_config_file(content, name, tmp_path):
  params, official = tensors("class")
  write(tmp_path / "model.safetensors", official)
  (tmp_path / name).write_text(content)
  assert_same(generator.load(tmp_path, {})[1], params)
  assert "dim is 32 in the settings, but 16 in the configuration" in error(tmp_path, dim=32)


GELU = "{_target_: torch.nn.GELU, _partial_: true, approximate: tanh}"


@pytest.mark.parametrize(
  "content,named",
  [
    (class_yaml("codebook_size: 20", "codebook_size: 21"), "vocab is 21 in model"),
    (class_yaml("codebook_size: 20", "codebook_size: 21"), "preprocessor.codebook_size, but 20 in "),
    (class_yaml("num_blocks: 2", "num_blocks: 3"), "trunk.num_blocks, but 2 in the weights"),
    (class_yaml("num_heads: 2", "num_heads: 4"), "head_dim is 4 in "),
    (class_yaml("num_heads: 2", "num_heads: 2\n            qkv_bias: true"), "qkv_bias is True in "),
    (class_yaml("Transformer\n", "MoETransformer\n"), "trunk._target_ 'l3m.model.trunks.transformer.MoETransformer'"),
    (class_yaml("post_trunk_norm: true", ""), "trunk.post_trunk_norm must be True, got False (the default"),
    (class_yaml("is_causal: true", "is_causal: false"), "attn_target.is_causal must be True"),
    (class_yaml("is_causal: true", "is_causal: true\n            rope_pos_embed: {}"), "rope_pos_embed must be None"),
    (class_yaml("pos_embed_type: absolute", ""), "pos_embed_type must be"),
    (class_yaml("use_bias: false\n", "use_bias: false\n          layer_scale: 0.1\n"), "trunk.layer_scale = 0.1"),
    (class_yaml("{_target_: torch.nn.GELU, _partial_: true}", GELU), "act_layer must be the exact GELU"),
    (class_yaml("eps: 1e-5", "eps: 2"), "qk_norm.eps must be"),
    (class_yaml("models:", "models:\n      critic: {_target_: x}"), "has 'critic'"),
    (class_yaml("16\n", "${nowhere}\n"), "embed_dim must be a whole number in [1, 65536], got '${nowhere}'"),
    (class_yaml("16\n", "${model.a}\n").replace("\nmodel:", "\nmodel:\n  a: ${model.a}"), "circular interpolations"),
    (text_yaml("EfficientAttention", "AttentionWithMask"), "AttentionWithMask"),
    (text_yaml("GeneralizedAttentionWithMask", "Other"), "only"),
    (text_yaml("self_attn_mask_read_key: text_mask", "self_attn_mask_read_key: other"), "must be 'text_mask'"),
    (text_yaml(", approximate: tanh", ""), "act_layer must be a GELU with approximate: tanh"),
    (text_yaml("SwiGLUFFN", "GeGELU"), "ffn_target._target_ 'l3m.model.layers.ffn.GeGELU' is not supported"),
    (text_yaml("top_k: 7", "top_k: many"), "generation.top_k must be"),
    ("model: 3", "model.meta_model is missing"),
    ("model: !!python/object/apply:os.system [touch CANARY]", "not plain YAML"),
    ("- 1", "expected a YAML mapping"),
    ("a: &a [*a]", "not plain YAML"),
    ("a: [" * 3000, "not plain YAML"),
    ("widht: 3", "unknown name 'widht' in the configuration"),
  ],
  ids=[
    "ids",
    "ids_origin",
    "depth",
    "heads",
    "qkv_bias",
    "trunk",
    "no_final_norm",
    "not_causal",
    "rope",
    "no_positions",
    "unknown_argument",
    "activation",
    "qk_eps",
    "model",
    "nowhere",
    "circle",
    "self_attention",
    "cross_attention",
    "unmasked",
    "text_activation",
    "gated_gelu",
    "sampling",
    "no_calls",
    "code",
    "list",
    "alias",
    "deep",
    "typo",
  ],
)
def test_unsupported_config_files_are_refused(content, named, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _, official = tensors("class" if "Transformer\n" in content or "MoE" in content else "text")
  write(tmp_path / "model.safetensors", official)
  (tmp_path / "config.yaml").write_text(content)
  assert named in error(tmp_path)
  assert not (tmp_path / "CANARY").exists()


def test_interpolations():
  config = dict(a=dict(b=3, c="${a.b}", d="w${a.c}_${a.b}"), e="${mul:${a.b},${sum:1}}", f="${mul:2,${a.c}}", g="1e-5")
  assert generator_config.resolve(config, config["a"]) == dict(b=3, c=3, d="w3_3")
  assert generator_config.resolve(config, ["${f}", "${e}", "${g}", None]) == [6, "${mul:3,${sum:1}}", 1e-5, None]


@pytest.mark.parametrize("length, values", [(40, 1), (2, 9000), (1, 1000)])
def test_interpolations_that_grow_are_refused(length, values):
  """Each of them doubles the text of the one before; long texts; long lists."""
  config = {"a0": "x" * values} | {f"a{i}": f"${{a{i - 1}}}${{a{i - 1}}}" for i in range(1, length)}
  config["b"] = [f"${{a{length - 1}}}"] * 1000
  config["c"] = ["${b}"] * 1000
  with pytest.raises(ValueError, match="interpolations") as error:
    generator_config.resolve(config, config["c"])
  assert "\n" not in str(error.value)
