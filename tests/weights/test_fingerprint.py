"""The fingerprint tells tokenizers apart by what decides token ids, and by nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.stages import make_stage
from flextok_jax.weights import loading, saving
from flextok_jax.weights.fingerprint import fingerprint
from tests.support.tiny import make_params, tiny_config

TINY_VAE = dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)


@pytest.fixture(scope="module")
def model():
  """(config, params) of a tokenizer with a VAE."""
  cfg = tiny_config(vae=TINY_VAE)
  return cfg, make_params(make_stage(cfg))


def changed(params, *path):
  """The parameters with one number of an array a hundredth larger."""
  if not path:
    array = np.array(params)
    array.flat[0] *= 1.01
    return array
  return {**params, path[0]: changed(params[path[0]], *path[1:])}


def test_fingerprint_is_that_of_shards_written_long_ago(model):
  cfg, params = model
  simple = jax.tree.map(lambda x: (np.arange(x.size, dtype=np.float32) % 97 - 48).reshape(x.shape) / 16, params)
  assert fingerprint(cfg, simple) == "d7813e334da4eaa9"


def test_fingerprint_is_the_same_in_all_types_and_files(model, tmp_path):
  cfg, params = model
  expected = fingerprint(cfg, params)
  assert fingerprint(cfg, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)) == expected
  saving.save_weights(tmp_path / "w.safetensors", cfg, params, "bfloat16")
  for dtype in ("float32", "bfloat16"):
    assert fingerprint(*loading.load(tmp_path / "w.safetensors", param_dtype=dtype, dtype=dtype)) == expected
  saving.save_official(tmp_path / "official.safetensors", cfg, params)  # tells no image size; the settings otherwise
  loaded = loading.load(tmp_path / "official.safetensors", vae_norm_num_groups=4, image_size=16)
  assert fingerprint(*loaded) == expected


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
def test_fingerprint_changes_with_what_encodes(model, path):
  assert fingerprint(model[0], changed(model[1], *path)) != fingerprint(*model)


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
def test_fingerprint_changes_with_settings_of_encoding(model, overrides):
  cfg = tiny_config(**{**dict(vae=TINY_VAE), **{k: v for k, v in overrides.items() if "." not in k}})
  with cfg.unlocked():
    cfg.update_from_flattened_dict({k: v for k, v in overrides.items() if "." in k})
  assert fingerprint(cfg, model[1]) != fingerprint(*model)


def test_decoders_and_ways_to_compute_have_no_influence(model):
  cfg, params = model
  other = {**params, "decoder": {}, "vae": changed(params["vae"], "post_quant_conv", "kernel")}
  with_settings = cfg.copy_and_resolve_references()
  with with_settings.unlocked():
    with_settings.update(dict(dtype="bfloat16", attention="xla", remat="full", sampler=dict(num_steps=9)))
    with_settings.decoder.update(activation="relu")
  assert fingerprint(with_settings, other) == fingerprint(cfg, params)
  with pytest.raises(ValueError, match="stage 'vae' has no tokens"):
    fingerprint(tiny_config(stage="vae"), params)
