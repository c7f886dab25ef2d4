"""A tokenizer's fingerprint depends on everything that affects token ids, and on nothing else."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flextok_jax
from flextok_jax.stages import make_stage
from flextok_jax.weights import fingerprints, loading, saving
from tests.support.tiny import make_params, tiny_config

ASSETS = Path(flextok_jax.__file__).parent / "assets"
TINY_VAE = dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)


@pytest.fixture(scope="module")
def model():
  """(config, params) of a tokenizer with a VAE."""
  cfg = tiny_config(vae=TINY_VAE)
  return cfg, make_params(make_stage(cfg))


def changed(params, *path):
  """Returns the parameters with one value of an array increased by 1%."""
  if not path:
    array = np.array(params)
    array.flat[0] *= 1.01
    return array
  return {**params, path[0]: changed(params[path[0]], *path[1:])}


@pytest.mark.parametrize("name, expected", [("glyphs", "dfddc03374af7f3a"), ("shapes", "11c1a1c7cf3f578e")])
def test_fingerprints_of_shipped_tokenizers(name, expected):
  """Generators and token shards store them: a change here would break the link to their tokenizer."""
  assert fingerprints.tokenizer(*loading.load(ASSETS / f"{name}.safetensors")) == expected


def test_fingerprint_of_existing_token_shards(model):
  cfg, params = model
  simple = jax.tree.map(lambda x: (np.arange(x.size, dtype=np.float32) % 97 - 48).reshape(x.shape) / 16, params)
  assert fingerprints.tokenizer(cfg, simple) == "f04fdab7d9db512e"


def test_fingerprint_is_independent_of_dtype_and_file_format(model, tmp_path):
  cfg, params = model
  expected = fingerprints.tokenizer(cfg, params)
  assert fingerprints.tokenizer(cfg, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)) == expected
  saving.save_weights(tmp_path / "w.safetensors", cfg, params, "bfloat16")
  for dtype in ("float32", "bfloat16"):
    assert fingerprints.tokenizer(*loading.load(tmp_path / "w.safetensors", param_dtype=dtype, dtype=dtype)) == expected
  saving.save_official(tmp_path / "official.safetensors", cfg, params)  # has no image size, but all other settings
  loaded = loading.load(tmp_path / "official.safetensors", vae_norm_num_groups=4, image_size=16)
  assert fingerprints.tokenizer(*loaded) == expected


@pytest.mark.parametrize(
  "path",
  [
    ("encoder", "registers"),
    ("encoder", "patch_embed", "kernel"),
    ("vae", "encoder", "conv_in", "kernel"),
    ("vae", "quant_conv", "bias"),
  ],
  ids="/".join,
)
def test_fingerprint_depends_on_encoder_weights(model, path):
  assert fingerprints.tokenizer(model[0], changed(model[1], *path)) != fingerprints.tokenizer(*model)


@pytest.mark.parametrize(
  "overrides",
  [
    dict(tokens=dict(num_registers=4, levels=(5, 8, 5))),
    dict(vae=TINY_VAE | dict(scaling_factor=0.5)),
    dict(vae=TINY_VAE | dict(norm_groups=2)),
    {"encoder.head_dim": 8},
    {"encoder.activation": "relu"},
    dict(image_size=32),
  ],
  ids=["levels", "scaling", "groups", "head_dim", "activation", "image_size"],
)
def test_fingerprint_depends_on_encoding_settings(model, overrides):
  cfg = tiny_config(**{**dict(vae=TINY_VAE), **{k: v for k, v in overrides.items() if "." not in k}})
  with cfg.unlocked():
    cfg.update_from_flattened_dict({k: v for k, v in overrides.items() if "." in k})
  assert fingerprints.tokenizer(cfg, model[1]) != fingerprints.tokenizer(*model)


def test_fingerprint_ignores_decoders_and_compute_settings(model):
  cfg, params = model
  other = {**params, "decoder": {}, "vae": changed(params["vae"], "post_quant_conv", "kernel")}
  with_settings = cfg.copy_and_resolve_references()
  with with_settings.unlocked():
    with_settings.update(dict(dtype="bfloat16", attention="xla", remat="full", sampler=dict(num_steps=9)))
    with_settings.decoder.update(activation="relu")
  assert fingerprints.tokenizer(with_settings, other) == fingerprints.tokenizer(cfg, params)
  with pytest.raises(ValueError, match="stage 'vae' has no tokens"):
    fingerprints.tokenizer(tiny_config(stage="vae"), params)
