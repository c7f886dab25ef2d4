"""FlexTok.features: against numpy, fewer registers and blocks, jit, batches, errors."""

import functools

import jax
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

from flextok_jax.inference import programs
from flextok_jax.inference import tokenizer as api
from flextok_jax.ops import fsq
from flextok_jax.stages import make_stage
from tests.support import numpy_reference as reference
from tests.support.golden_weights import to_official
from tests.support.tiny import make_params, tiny_config

DEPTH, TOKENS, WIDTH, HEAD_DIM = 3, 12, 32, 16


@functools.cache
def model(layout="registers", fast=True):
  """Returns a random tokenizer in pixel space: 16 px, 4 x 4 patches, 12 registers or a grid of 16 tokens."""
  part = dict(width=WIDTH, head_dim=HEAD_DIM, patch_size=4)
  tokens = dict(num_registers=TOKENS, levels=(8, 5, 5), nested_dropout="uniform")
  decoder = part | dict(depth=1)
  if layout == "grid":
    tokens |= dict(layout="grid", num_registers=16, nested_dropout="none")
    decoder |= dict(modulation="shared")
  config = tiny_config(encoder=part | dict(depth=DEPTH), decoder=decoder, tokens=tokens, fast=fast)
  return api.FlexTok(make_params(make_stage(config)), FrozenConfigDict(config))


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(1).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)


def blocks_in_numpy(layout, images, layers):
  w = reference.float64(to_official({"encoder": model(layout).params["encoder"]}))
  return reference.encoder_blocks(w, images.astype(np.float64), HEAD_DIM, layers=layers)


@pytest.mark.parametrize("layer", [1, 2, 3, None])
def test_registers_and_patches_of_every_block_are_those_of_numpy(images, layer):
  """Gaps of up to 1.3e-5 between values of up to 11 were measured."""
  patches, registers = blocks_in_numpy("registers", images, layer)
  for fast in (True, False):
    found = model(fast=fast).features(images, layer=layer)
    assert found.dtype == np.float32 and found.shape == (3, TOKENS, WIDTH)
    np.testing.assert_allclose(found, registers, rtol=1e-4, atol=1e-4)
    found = model(fast=fast).features(images, "patches", layer)
    assert found.dtype == np.float32 and found.shape == (3, 16, WIDTH)
    np.testing.assert_allclose(found, patches, rtol=1e-4, atol=1e-4)


def test_patches_and_codes_of_a_grid(images):
  for layer in (2, None):
    patches, _ = blocks_in_numpy("grid", images, layer)
    np.testing.assert_allclose(model("grid").features(images, "patches", layer), patches, rtol=1e-4, atol=1e-4)
  codes = model("grid").features(images, "codes", num_tokens=3)
  np.testing.assert_array_equal(fsq.codes_to_ids(codes, (8, 5, 5)), model("grid").tokenize(images, 3))


def test_codes_are_those_of_the_token_ids(images):
  codes, ids = model().features(images, "codes"), model().tokenize(images)
  assert codes.dtype == np.float32 and codes.shape == (3, TOKENS, 3)
  np.testing.assert_allclose(codes, fsq.ids_to_codes(ids, (8, 5, 5)), atol=1e-6)
  assert len(np.unique(codes)) > 4


@pytest.mark.parametrize("what", ["registers", "codes"])
def test_fewer_tokens_are_the_first_ones_and_take_less(images, what):
  whole = model().features(images, what)
  for count in (1, 7):
    found = model().features(images, what, num_tokens=count)
    np.testing.assert_allclose(found, whole[:, :count], rtol=1e-5, atol=1e-5)
  flops = lambda *args: programs.features.lower(model(), images, *args).cost_analysis()["flops"]
  assert flops(what, DEPTH, 8) < 0.9 * flops(what, DEPTH, TOKENS)
  assert flops("registers", 1, TOKENS) < 0.7 * flops("registers", 2, TOKENS)
  assert flops("patches", DEPTH, TOKENS) < 0.8 * flops("registers", DEPTH, TOKENS)


def test_in_jit_and_in_batches(images):
  for what in api.FEATURES:
    expected = model().features(images, what)
    compiled = jax.jit(lambda model, images, what=what: model.features(images, what))
    np.testing.assert_allclose(compiled(model(), images), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model().features(images, what, batch_size=2), expected, rtol=1e-5, atol=1e-5)
  gradient = jax.grad(lambda x: model().features(x, layer=2).sum())(images)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize(
  "pattern, arguments",
  [
    ("what='tokens' must be one of registers, patches, codes", dict(what="tokens")),
    ("layer=4 must be a whole number from 1 to 3", dict(layer=4)),
    ("layer=0 must be a whole number from 1 to 3", dict(what="patches", layer=0)),
    ("layer=2 has no effect on codes, which follow the last block: leave it out", dict(what="codes", layer=2)),
    ("num_tokens=2 has no effect on patches: leave it out", dict(what="patches", num_tokens=2)),
    ("num_tokens=13 must be a whole number from 1 to 12", dict(num_tokens=13)),
    ("batch_size=0 must be a whole number of at least 1", dict(batch_size=0)),
  ],
)
def test_bad_arguments(images, pattern, arguments):
  with pytest.raises(ValueError, match=pattern):
    model().features(images, **arguments)


def test_other_models_have_no_registers(images):
  with pytest.raises(ValueError, match="are a grid, without registers: use what='patches' or what='codes'"):
    model("grid").features(images)
  config = tiny_config(stage="vae", vae=dict(kind="autoencoder_kl", block_out_channels=(8, 8), norm_groups=4))
  vae = api.FlexTok({}, FrozenConfigDict(config))
  with pytest.raises(ValueError, match="this is a model of stage 'vae': it has latents, but no tokens"):
    vae.features(images)
