"""config.json of diffusers' autoencoders to our settings and back."""

import json

from ml_collections import ConfigDict
import pytest

from flextok_jax.core.literals import parse_json
from flextok_jax.weights.official.diffusers import from_diffusers, to_diffusers
from tests.support.official_configs import CODE, DEEP, DELETE, put, refused

VAE = dict(
  kind="autoencoder_kl",
  latent_channels=16,
  block_out_channels=(8, 16, 24),
  layers_per_block=2,
  norm_groups=4,
  scaling_factor=0.5,
  sample_posterior=True,
  dtype="float32",
)


class TestDiffusers:
  def test_round_trip(self):
    written = to_diffusers(VAE, 64)
    assert from_diffusers(written) == VAE and from_diffusers(parse_json(json.dumps(written), "config.json")) == VAE
    assert written["sample_size"] == 64 and written["down_block_types"] == ["DownEncoderBlock2D"] * 3
    assert to_diffusers(ConfigDict(VAE), 64) == written

  def test_defaults(self):
    expected = VAE | dict(
      latent_channels=4, block_out_channels=(64,), layers_per_block=1, norm_groups=32, scaling_factor=0.18215
    )
    assert from_diffusers({"_class_name": "AutoencoderKL"}) == expected

  def test_fields_without_effect(self):
    extra = dict(
      _diffusers_version="0.32.0",
      _name_or_path="../x",
      force_upcast=False,
      sample_size=[64, 64],
      shift_factor=None,
      latents_mean=None,
      latents_std=None,
      use_quant_conv=True,
      use_post_quant_conv=True,
      mid_block_add_attention=True,
    )
    assert from_diffusers(to_diffusers(VAE, 64) | extra) == VAE

  @pytest.mark.parametrize(
    "name, value, pattern",
    [
      ("_class_name", "AutoencoderTiny", "_class_name must be 'AutoencoderKL', got 'AutoencoderTiny'"),
      ("_class_name", DELETE, "_class_name is missing"),
      ("act_fn", "gelu", "act_fn must be 'silu'"),
      ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"], "down_block_types"),
      ("up_block_types", ["UpDecoderBlock2D"] * 2, "up_block_types must have 3 entries"),
      ("block_out_channels", [8, 16, 24, 32], "down_block_types must have 4 entries"),
      ("block_out_channels", [8, 16, 22], "norm_num_groups must divide"),
      ("block_out_channels", "8", "block_out_channels must be a list"),
      ("block_out_channels", [8, 16, 10**6], "block_out_channels must be a list"),
      ("in_channels", 4, "in_channels must be 3"),
      ("latent_channels", 0, "latent_channels must be"),
      ("layers_per_block", True, "layers_per_block must be"),
      ("norm_num_groups", 0, "norm_num_groups must be"),
      ("scaling_factor", float("nan"), "scaling_factor must be"),
      ("shift_factor", 0.1, "shift_factor must be None, got 0.1"),
      ("latents_mean", [0.0], "latents_mean must be None"),
      ("use_quant_conv", False, "use_quant_conv must be True, got False"),
      ("mid_block_add_attention", False, "mid_block_add_attention must be True"),
      ("surprise", CODE, "AutoencoderKL.surprise = .* is not supported"),
      ("surprise", DEEP, "nested deeper"),
    ],
  )
  def test_unsupported_values_are_refused(self, name, value, pattern):
    config = to_diffusers(VAE, 64)
    put(config, name, value)
    refused(pattern, from_diffusers, config)

  def test_invalid_configurations(self):
    for config in (None, [], 3):
      refused("must be", from_diffusers, config)
    refused("vae.kind must be 'autoencoder_kl'", to_diffusers, VAE | dict(kind="pixels"), 64)
    refused("norm_num_groups must divide", to_diffusers, VAE | dict(norm_groups=3), 64)
