"""Configs of official tokenizers whose tokens are on a grid, to our settings and back."""

import copy
import random

import pytest

from flextok_jax.core.literals import parse_literals
from flextok_jax.weights.official.tokenizer import from_official
from flextok_jax.weights.official.tokenizer_names import DEFAULT_ROLES
from flextok_jax.weights.official.writer import to_official
from tests.support.official_configs import D, E, metadata_of, ours, put, refused, settings
from tests.weights.official.test_tokenizer import renamed

GRID = ours(
  tokens__layout="grid",
  tokens__num_registers=0,  # depends on the size of the VAE, which a file does not state
  tokens__nested_dropout="none",
  decoder__modulation="shared",
  sampler__guidance_scale=5.0,
)
REGISTERS = {"encoder/registers", "decoder/register_positions", "decoder/nested_dropout"}


def test_round_trip():
  written = to_official(GRID)
  read, roles = from_official(written)
  assert read == GRID and set(roles) == set(DEFAULT_ROLES) - REGISTERS
  assert settings(parse_literals(metadata_of(written))) == GRID
  assert settings(renamed(written, random.Random(0))) == GRID
  zero = copy.deepcopy(GRID)
  zero["decoder"]["null_condition"] = "zero"
  assert settings(to_official(zero)) == zero


@pytest.mark.parametrize(
  "path, value, pattern",
  [
    (D + "dec_add_noise_and_latents.per_sample_op._target_", "builtins.sum", "per_sample_op._target_ 'builtins.sum'"),
    (D + "dec_add_noise_and_latents.read_keys", ["dec_patches", "quants"], "read_keys: key 'quants' holds the codes"),
    (D + "dec_seq_packer.input_list_read_keys", ["dec_quants"], "holds the codes after the null condition"),
    (D + "dec_seq_packer.per_subseq_embs", True, "adaLN_expansion must be 2"),
    (D + "dec_latent_dropout.replace_with_single_token", True, "must be False for tokens on a grid"),
    (E + "enc_seq_packer.mask_mode", "causal_last", "mask_mode must be 'full'"),
    (E + "enc_to_latents.read_key", "quants", "key 'quants' is written by nothing before it"),
  ],
)
def test_refusals(path, value, pattern):
  config = to_official(GRID)
  put(config, path, value)
  refused(pattern, from_official, config)


def test_modulation_is_shared():
  config = to_official(GRID)
  put(config, D + "dec_seq_packer.per_subseq_embs", True)
  put(config, D + "dec_transformer.adaLN_expansion", 2)
  refused("per_subseq_embs must be False for tokens on a grid", from_official, config)


def test_patches_of_two_sizes_have_no_official_form():
  config = copy.deepcopy(GRID)
  config["decoder"]["patch_size"] = 1
  refused("decoder.patch_size must be 2, that of the encoder, for tokens on a grid", to_official, config)
