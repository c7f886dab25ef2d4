"""Numbers of the public PyTorch classes wired as the 2D-grid tokenizer; tolerances as in the golden set's README."""

import ast
import json

import jax
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from flextok_jax.models.tokenizer.flextok import Sampler, sample_latents
from flextok_jax.ops import fsq
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.weights import loading, saving
from tests.conftest import SHARED
from tests.models.test_golden import FIXED_TABLES
from tests.support import numpy_reference as reference

pytestmark = pytest.mark.skipif(SHARED is None, reason="needs the golden set, ../shared/golden_grid")


@pytest.fixture(scope="module")
def golden():
  arrays = load_file(SHARED / "golden_grid" / "flextok_grid_io.safetensors")
  with jax.default_matmul_precision("highest"):
    yield {k: np.moveaxis(v, -3, -1) if v.ndim >= 4 else v for k, v in arrays.items()}


@pytest.fixture(scope="module")
def loaded():
  return loading.load(SHARED / "golden_grid" / "flextok_grid.safetensors", vae_norm_num_groups=4, image_size=64)


def test_import_and_export_are_lossless(loaded, tmp_path):
  """Written again, the file has the same tensors, bit for bit, and the same configuration."""
  path = SHARED / "golden_grid" / "flextok_grid.safetensors"
  config, params = loaded
  assert config.tokens.layout == "grid" and config.tokens.num_registers == 16
  assert config.sampler.guidance_scale == 5.0
  saving.save_official(tmp_path / "a.safetensors", config, params)
  official, written = load_file(path), load_file(tmp_path / "a.safetensors")
  assert set(written) == set(official)
  for key, value in official.items():
    atol = 1e-6 if key in FIXED_TABLES else 0.0  # sines and cosines of another library
    np.testing.assert_allclose(written[key], value, rtol=0, atol=atol, err_msg=key)
  metadata = [safetensors.safe_open(p, "numpy").metadata() for p in (path, tmp_path / "a.safetensors")]
  first, second = ({k: ast.literal_eval(v) for k, v in m.items() if k != "_target_"} for m in metadata)
  assert first == second
  stored = json.loads((SHARED / "golden_grid" / "flextok_grid_config.json").read_text())
  assert first == {k: v for k, v in stored.items() if k != "_target_"}
  again = loading.load(tmp_path / "a.safetensors", vae_norm_num_groups=4, image_size=64)
  assert again[0] == config
  jax.tree.map(np.testing.assert_array_equal, again[1], params)


def test_against_golden(loaded, golden):
  """Latents, ids, velocities with and without tokens, and 25 guided steps."""
  config, params = loaded
  model = make_model(config)
  apply = lambda *args, method: jax.jit(lambda *args: model.apply({"params": params}, *args, method=method))(*args)
  np.testing.assert_allclose(apply(golden["images"], method="encode_latents"), golden["vae_latents"], atol=5e-5)
  np.testing.assert_array_equal(apply(golden["images"], method="tokenize"), golden["tokens"])
  codes, keep_k = fsq.ids_to_codes(golden["tokens"], model.levels), np.full(3, 16)
  for drop, name in ((False, "step_v"), (True, "step_v_null")):
    v = apply(golden["step_x"], golden["step_t"], codes, keep_k, np.full(3, drop), method="velocity")
    np.testing.assert_allclose(v, golden[name], atol=1e-4)
  sampler = Sampler(**config.sampler)
  run = jax.jit(lambda noise: sample_latents(model, params, golden["tokens"], keep_k, noise, sampler))
  latents = run(golden["sample_init_noise"])
  np.testing.assert_allclose(latents, golden["sample_apg_latent"], atol=2e-4)
  np.testing.assert_allclose(apply(latents, method="decode_latents"), golden["sample_apg_image"], atol=2e-4)


def test_the_numpy_statement(golden):
  """By which gradients are checked where the golden set is absent."""
  w = reference.float64(load_file(SHARED / "golden_grid" / "flextok_grid.safetensors"))
  codes, ids = reference.fsq_quantize(reference.encode(w, golden["vae_latents"]), (8, 8, 8, 5, 5, 5))
  np.testing.assert_array_equal(ids, golden["tokens"])
  for null, name in ((None, "step_v"), (np.ones(3, bool), "step_v_null")):
    v = reference.velocity(w, golden["step_x"], golden["step_t"], codes, None, null)
    np.testing.assert_allclose(v, golden[name], atol=1e-4)
