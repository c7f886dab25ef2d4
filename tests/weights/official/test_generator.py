"""The authors' generators: settings derived from weights, explicit settings, and damaged files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flextok_jax import config as common
from flextok_jax import stages
from flextok_jax.parallel import sharding
from flextok_jax.weights.official import generator
from tests.support.official_generator_files import (
  BLOCK,
  CHOICES,
  MODEL,
  SETTINGS,
  abstract,
  assert_same,
  error,
  sincos,
  tensors,
  tiny_config,
  to_official,
  write,
)


@pytest.mark.parametrize("name", CHOICES)
def test_settings_are_derived_from_weights(name, tmp_path):
  params, official = tensors(name)
  expected = tiny_config(name)
  path = write(tmp_path / "any.safetensors", official)
  config, loaded = generator.load(path, CHOICES[name][1])
  assert_same(loaded, params)
  assert jax.tree.structure(loaded) == jax.tree.structure(abstract(config))
  made = {"guidance_scale", "mlp_ratio", "ffn_multiple_of"}
  for field in set(expected.ar) - made:
    assert config.ar[field] == expected.ar[field] or field == "num_classes" and config.ar.condition != "class", field
  for field in expected.text:
    assert config.text[field] == expected.text[field], field
  assert config.ar.guidance_scale == dict(text=3.0, none=1.0).get(config.ar.condition, 1.5)
  assert config.is_locked


def test_config_is_complete(tmp_path):
  config, _ = generator.load(write(tmp_path / "m.safetensors", tensors("class")[1]), {})
  base = common.get_config()
  for part in ("ar", "text"):
    assert list(config[part]) == list(base[part])
    for name in base[part]:
      assert type(config[part][name]) is type(base[part][name]), name
  assert {k: config[k] for k in ("stage", "seed", "dtype")} == dict(stage="ar", seed=0, dtype="float32")


@pytest.mark.parametrize("stored", [np.float32, np.float16, jnp.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_types(stored, tmp_path):
  params, official = tensors("gated")
  path = write(tmp_path / "m.safetensors", official, stored)
  for dtype in (None, "bfloat16"):
    config, loaded = generator.load(path, dict(head_dim=8), dtype)
    assert config.dtype == (dtype or "float32")
    assert config.ar.pos_embed == "sincos1d"  # even after rounding
    assert_same(loaded, jax.tree.map(lambda x, t=config.dtype: x.astype(stored).astype(t), params))


def test_mesh(tmp_path):
  mesh = sharding.make_mesh()
  _, loaded = generator.load(write(tmp_path / "m.safetensors", tensors("text")[1]), {}, mesh=mesh)
  assert_same(loaded, tensors("text")[0])
  assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(loaded))


def test_biases_of_some_layers(tmp_path):
  """If some layers have biases, those that no block has are zero."""
  params, official = tensors("text")
  few = {k: v for k, v in official.items() if not k.endswith((".qkv.bias", ".Wq.bias", ".Wk.bias", ".Wv.bias"))}
  few.pop(f"{MODEL}head.linear.bias")
  path = write(tmp_path / "m.safetensors", few)
  config, loaded = generator.load(path, {})
  assert config.ar.bias
  blocks = loaded["ar"]["blocks"]
  for bias in (blocks["attention"]["qkv"], blocks["cross"]["q"], blocks["cross"]["kv"], loaded["ar"]["readout"]):
    assert not np.asarray(bias["bias"]).any()
  assert_same(blocks["mlp"], params["ar"]["blocks"]["mlp"])
  assert "qkv_bias is True in the settings (bias), but False in the weights" in error(path, bias=True)
  assert "proj_bias is False in the settings (bias), but True in the weights" in error(path, bias=False)
  few.pop(f"{BLOCK}mlp.fc1.bias")  # missing in one block only
  assert f"lacks the tensor {BLOCK}mlp.fc1.bias" in error(write(tmp_path / "m.safetensors", few))


@pytest.mark.parametrize("setting", [dict(readout_multiplier=0.25), dict(mup_base_width=4)], ids=["factor", "base"])
def test_readout_multiplier_is_folded_into_the_kernel(setting, tmp_path):
  params, official = tensors("gated")
  path = write(tmp_path / "m.safetensors", official)
  config, loaded = generator.load(path, dict(head_dim=8, **setting))
  assert config.ar.readout_multiplier == 1
  np.testing.assert_allclose(loaded["ar"]["readout"]["kernel"], params["ar"]["readout"]["kernel"] / 4, rtol=1e-6)
  np.testing.assert_array_equal(loaded["ar"]["readout"]["bias"], params["ar"]["readout"]["bias"])
  text = error(path, head_dim=8, readout_multiplier=0.5, mup_base_width=4)
  assert "readout_multiplier is 0.5 in the settings, but 0.25 in the settings (mup_base_width / dim)" in text


def test_kinds_of_positions(tmp_path):
  _, official = tensors("gated")
  path = write(tmp_path / "m.safetensors", official)
  config, loaded = generator.load(path, dict(head_dim=8, pos_embed="absolute"))
  assert config.ar.pos_embed == "absolute"
  np.testing.assert_array_equal(loaded["ar"]["positions"], sincos(8, 16))
  official[f"{MODEL}preprocessor.positional_embedding"][3, 5] += 0.1
  path = write(tmp_path / "m.safetensors", official)
  assert generator.load(path, dict(head_dim=8))[0].ar.pos_embed == "absolute"
  assert "differs by 0.1 from it" in error(path, head_dim=8, pos_embed="sincos1d")


def test_unused_tensors_are_ignored(tmp_path):
  params, official = tensors("text")
  for name in ("text_encoder.t5_embedder.model.shared.weight", "image_tokenizer.flextok_model.vae.x"):
    official[f"models.{name}"] = np.zeros((2, 2), np.int64)  # of any type
  assert_same(generator.load(write(tmp_path / "m.safetensors", official), {})[1], params)


@pytest.mark.parametrize(
  "wrong",
  [
    dict(dim=32),
    dict(head_dim=4),
    dict(depth=3),
    dict(vocab=21),
    dict(num_tokens=9),
    dict(num_classes=None),
    dict(cross=True),
    dict(norm="rmsnorm"),
    dict(qk_norm=None),
    dict(ffn="swiglu"),
    dict(head_layernorm=True),
    dict(mlp_ratio=3),
  ],
  ids=lambda wrong: next(iter(wrong)),
)
def test_settings_that_contradict_the_weights_are_refused(wrong, tmp_path):
  params, official = tensors("class")
  path = write(tmp_path / "m.safetensors", official)
  assert_same(generator.load(path, SETTINGS)[1], params)
  text = error(path, **SETTINGS | wrong)
  name, value = next(iter(wrong.items()))
  assert "in the settings" in text and "in the weights" in text
  assert name in text and repr("none" if name == "qk_norm" else value) in text.replace("3.0", "3")


@pytest.mark.parametrize(
  "wrong,named",
  [
    (dict(width=16), "unknown name 'width' in the settings: known are dim, head_dim,"),
    (dict(dim="16"), "dim in the settings must be a whole number"),
    (dict(norm="batchnorm"), "norm in the settings must be 'layernorm' or 'rmsnorm', got 'batchnorm'"),
    (dict(readout_multiplier=0), "readout_multiplier in the settings must be a number in"),
  ],
  ids=["unknown", "type", "choice", "range"],
)
def test_invalid_settings_are_refused(wrong, named, tmp_path):
  path = write(tmp_path / "m.safetensors", tensors("class")[1])
  with pytest.raises(ValueError, match="^" + named.replace("[", r"\[")):
    generator.load(path, wrong)


def drop(name):
  return lambda official: official.pop(name)


def put(name, *shape):
  return lambda official: official.__setitem__(name, np.zeros(shape))


@pytest.mark.parametrize(
  "damage,named",
  [
    (lambda o: [o.pop(k) for k in list(o) if k.startswith(MODEL)] and o.update(x=np.zeros(1)), "no generator"),
    (drop(f"{MODEL}trunk.post_trunk_norm.weight"), f"lacks the tensor {MODEL}trunk.post_trunk_norm.weight"),
    (drop(f"{MODEL}preprocessor.positional_embedding"), "preprocessor.positional_embedding"),
    (drop(f"{BLOCK}attn.proj.weight"), f"lacks the tensor {BLOCK}attn.proj.weight"),
    (drop(f"{BLOCK}norm_2.bias"), f"lacks the tensor {BLOCK}norm_2.bias"),
    (lambda o: [o.pop(k) for k in list(o) if k.startswith(BLOCK)], "no whole series"),
    (put(f"{BLOCK}attn.relative", 2), f"has a tensor '{BLOCK}attn.relative'"),
    (put("optimizer.step", 1), "has a tensor 'optimizer.step'"),
    (put("models.text_encoder.mlp.fc1.weight", 4, 4), "has a tensor 'models.text_encoder.mlp.fc1.weight'"),
    (put(f"{BLOCK}cross_attn.Wq.weight", 16, 16), "on classes or on texts"),
    (put(f"{BLOCK}attn.qkv.weight", 32, 16), f"{BLOCK}attn.qkv.weight has shape [32, 16]"),
    (put(f"{MODEL}preprocessor.sos_token_embed", 1, 16), "sos_token_embed has shape [1, 16]"),
    (put(f"{MODEL}preprocessor.positional_embedding", 8, 12), "positional_embedding has shape [8, 12]"),
    (put(f"{MODEL}preprocessor.embedding.weight", 16), "embedding.weight has shape [16], expected 2 axes"),
    (put(f"{MODEL}head.linear.weight", 21, 16), "vocab is 20 in the weights, but 21 in the weights' head.linear"),
    (put(f"{BLOCK}mlp.fc1.weight", 30, 16), "blocks.1.mlp.fc1.weight has shape [64, 16], expected [30, 16]"),
  ],
  ids=[
    "foreign",
    "no_final_norm",
    "no_positions",
    "no_projection",
    "half_a_norm",
    "no_block",
    "unknown",
    "training",
    "unasked_text",
    "two_conditions",
    "qkv_shape",
    "start_shape",
    "positions_shape",
    "rank",
    "ids",
    "hidden",
  ],
)
def test_damaged_weights(damage, named, tmp_path):
  _, official = tensors("class")
  damage(official)
  assert named in error(write(tmp_path / "m.safetensors", official))


def test_head_size_must_be_given_if_weights_do_not_determine_it(tmp_path):
  path = write(tmp_path / "m.safetensors", tensors("none")[1])
  assert "head_dim 64 (the default) does not divide dim 16" in error(path)


def test_missing_files(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="no .safetensors file in it"):
    generator.load(tmp_path, {})
  with pytest.raises(FileNotFoundError, match="no such generator"):
    generator.load(tmp_path / "none.safetensors", {})
  for name in "ab":
    (tmp_path / f"{name}.safetensors").write_bytes(b"no")
  assert "several .safetensors files (a.safetensors, b.safetensors)" in error(tmp_path)
  assert "not a whole safetensors file" in error(tmp_path / "a.safetensors")

  def refuse(repository, name, **kwargs):
    raise OSError(f"offline: {name}")

  monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
  with pytest.raises(FileNotFoundError, match=r"no/such .*offline: .*Download config.yaml and model"):
    generator.load("no/such", {})


def fields(settings):
  """Converts the reference's settings to ours, by section."""
  names = dict(
    dim="width",
    vocab="num_ids",
    head_dim="head_dim",
    depth="depth",
    num_tokens="num_tokens",
    norm="norm",
    ffn="ffn",
    ffn_multiple_of="ffn_multiple_of",
    pos_embed="pos_embed",
    bias="bias",
    head_layernorm="head_layernorm",
  )
  ar = {names[k]: v for k, v in settings.items() if k in names}
  ar |= dict(qk_norm=settings["qk_norm"] or "none", condition="text" if settings["cross"] else "class")
  if not settings["cross"]:
    ar["num_classes"] = settings["num_classes"]
  return ar


@pytest.mark.parametrize("name", ["c2i_a", "c2i_b", "t2i"])
def test_golden_files(name, shared):
  path = shared / "golden_ar" / f"ar_{name}.safetensors"
  settings = json.loads((shared / "golden_ar" / f"ar_{name}_config.json").read_text())
  config, params = generator.load(path, settings)
  stripped, same = generator.load(path, {})
  assert_same(params, same)
  for c in (config, stripped):
    assert {k: c.ar[k] for k in fields(settings)} == fields(settings)
  if settings["cross"]:
    assert (config.text.max_length, config.text.features, stripped.text.features) == (12, 64, 64)
  stored, written = load_file(path), to_official(jax.device_get(params), config)
  assert stored.keys() == written.keys()
  for key, tensor in stored.items():
    np.testing.assert_allclose(written[key], tensor, rtol=0, atol=1e-5 if "sos" not in key and "pos" in key else 0)
  # Layouts that a round trip cannot verify: the model computes the reference's logits.
  io = load_file(shared / "golden_ar" / f"ar_{name}_io.safetensors")
  ids = io["tokens"].astype(np.int32)
  condition = (
    [io["classes"].astype(np.int32)]
    if "classes" in io
    else [np.full(len(ids), -1), io["text_emb_raw"][: len(ids)], io["text_len"][: len(ids)]]
  )
  model = stages.make_stage(config).model
  logits = jax.jit(lambda params: model.apply({"params": params}, ids, *condition))(params)
  np.testing.assert_allclose(logits, io["logits_cond"], atol=1e-4)
