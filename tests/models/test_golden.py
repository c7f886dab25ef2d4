"""Numbers of the public PyTorch implementation: a tiny model with random weights, and model-free cases.

Tolerances are those that the golden set's README derives from float64 against float32: rtol 1e-4 and the atol at each
test.
"""

import ast
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from flextok_jax import config as common
from flextok_jax.models.tokenizer.decoder import TimeEmbedding
from flextok_jax.models.tokenizer.flextok import Sampler, sample_latents
from flextok_jax.ops import flow, fsq, guidance, nested, posemb
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.weights import loading, saving
from tests.conftest import SHARED
from tests.support import golden_weights

pytestmark = pytest.mark.skipif(SHARED is None, reason="needs the golden set, ../shared/golden")
FIXED_TABLES = {  # stored by official checkpoints, computed by us
  "encoder.module_dict.enc_patches_posemb_module.posembs",
  "decoder.module_dict.dec_patches_posemb_module.posembs",
}
LEVELS = {"888555": (8, 8, 8, 5, 5, 5), "865": (8, 6, 5), "75555": (7, 5, 5, 5, 5), "88865": (8, 8, 8, 6, 5)}
SAMPLERS = {  # steps and guidance as recorded in flextok_tiny_meta.json
  "cfg": dict(num_steps=25, guidance="cfg", guidance_scale=3.0),
  "apg": dict(num_steps=25, guidance="apg", guidance_scale=7.5),
  "apg_full": dict(num_steps=25, guidance="apg", guidance_scale=7.5),
  "noguid": dict(num_steps=4, guidance="apg", guidance_scale=1.0),
}


def close(actual, desired, atol):
  np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=atol)


def load(name):
  """Returns a golden file with images, latents and tables turned channels-last."""
  arrays = load_file(SHARED / "golden" / f"{name}.safetensors")
  return {k: np.moveaxis(v, -3, -1) if v.ndim >= 4 else v for k, v in arrays.items()}


@pytest.fixture(scope="module", autouse=True)
def full_precision():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def golden():
  return load("flextok_tiny_io")


@pytest.fixture(scope="module")
def units():
  return load("units")


@pytest.fixture(scope="module")
def loaded():
  return loading.load(SHARED / "golden" / "flextok_tiny.safetensors", vae_norm_num_groups=4, image_size=64)


@pytest.fixture(scope="module")
def model(loaded):
  return make_model(loaded[0])


@pytest.fixture(scope="module")
def params(loaded):
  return loaded[1]


@pytest.fixture(scope="module")
def velocity(model, params, golden):
  """Velocity of the golden noised latents: (t, keep_k, drop_condition) -> [3, 8, 8, 16]."""

  @jax.jit
  def fn(t, keep_k, drop):
    return model.apply({"params": params}, golden["step_x"], t, golden["quants"], keep_k, drop, method="velocity")

  return fn


@pytest.fixture(scope="module")
def decode(model, params):
  return jax.jit(lambda latents: model.apply({"params": params}, latents, method="decode_latents"))


def test_import_and_export_are_lossless(loaded, tmp_path):
  """Written again, the file has the same tensors, bit for bit, and the same configuration; so has the hub's layout."""
  golden = SHARED / "golden" / "flextok_tiny.safetensors"
  official = load_file(golden)
  for name, path in (("a.safetensors", "a.safetensors"), ("hub", "hub/model.safetensors")):
    saving.save_official(tmp_path / name, *loaded)
    written = load_file(tmp_path / path)
    assert set(written) == set(official)
    for key, value in official.items():
      assert written[key].dtype == value.dtype
      atol = 1e-6 if key in FIXED_TABLES else 0.0  # sines and cosines of another library
      np.testing.assert_allclose(written[key], value, rtol=0, atol=atol, err_msg=key)
    again = loading.load(tmp_path / name, vae_norm_num_groups=4, image_size=64)
    assert again[0] == loaded[0]
    jax.tree.map(np.testing.assert_array_equal, again[1], loaded[1])
  metadata = [safetensors.safe_open(path, "numpy").metadata() for path in (golden, tmp_path / "a.safetensors")]
  first, second = ({k: ast.literal_eval(v) for k, v in m.items() if k != "_target_"} for m in metadata)
  assert first == second and metadata[0]["_target_"] == metadata[1]["_target_"]
  assert json.loads((tmp_path / "hub" / "config.json").read_text()) == first
  assert max(map(len, metadata[1].values())) < 10_000  # longer text is not parsed by the authors' loader


def test_images_to_tokens(model, params, golden):
  apply = lambda x, method: jax.jit(lambda x: model.apply({"params": params}, x, method=method))(x)
  latents = apply(golden["images"], "encode_latents")
  close(latents, golden["vae_latents"], 5e-5)
  encoder = model.encoder.clone(parent=None)
  close(encoder.apply({"params": params["encoder"]}, [(latents, None)])[0], golden["enc_latents"], 5e-5)
  np.testing.assert_array_equal(apply(latents, "encode"), golden["quants"])
  np.testing.assert_array_equal(apply(golden["images"], "tokenize"), golden["tokens"])
  np.testing.assert_array_equal(fsq.ids_to_codes(golden["tokens"], model.levels), golden["quants"])


def test_sincos_tables(golden):
  close(posemb.sincos_2d(8, 8, 128), golden["sincos_enc"][0], 1e-6)
  close(posemb.sincos_2d(16, 16, 64), golden["sincos_16x16_d64"][0], 1e-6)
  official = load("flextok_tiny")
  for name in FIXED_TABLES:
    close(posemb.sincos_2d(8, 8, official[name].shape[-1]), official[name][0], 1e-6)


def test_time_embedding(params, golden):
  close(posemb.timestep_features(golden["temb_t"], 256), golden["temb_freq"], 2e-4)
  out = TimeEmbedding(192).apply({"params": params["decoder"]["time_embed"]}, golden["temb_t"])
  close(out, golden["temb_out"], 2e-4)  # as its input


@pytest.mark.parametrize("i", range(3))
def test_velocity_with_kept_tokens(velocity, golden, i):
  close(velocity(golden["step_t"], golden[f"step_keep{i}"], np.zeros(3, bool)), golden[f"step_v{i}"], 1e-4)


def test_velocity_with_all_tokens(velocity, golden):
  close(velocity(golden["step_t"], np.full(3, 16), np.zeros(3, bool)), golden["step_v_nokeep"], 1e-4)


def test_velocity_without_condition(velocity, golden):
  close(velocity(golden["step_t"], np.full(3, 16), np.ones(3, bool)), golden["step_v_null"], 1e-4)
  close(velocity(golden["step_t"], golden["step_keep0"], np.ones(3, bool)), golden["step_v_null"], 1e-4)
  mixed = golden["step_null_mixed_mask"]
  close(velocity(golden["step_t"], golden["step_keep0"], mixed), golden["step_v_null_mixed"], 1e-4)


def test_velocity_at_other_times(velocity, golden):
  for t, expected in zip(golden["step_all_t"], golden["step_v_all_t"]):
    close(velocity(np.full(3, t, np.float32), golden["step_keep0"], np.zeros(3, bool)), expected, 1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling(model, params, decode, golden, name, monkeypatch):
  """The final latents, the images, and the latents after some of the steps: the velocity is stopped after them."""
  settings, euler_steps = SAMPLERS[name], flow.euler_steps

  @jax.jit
  def run(steps):

    def stopped(velocity_fn, noise, num_steps, *more):
      def until(x, t, carry, inputs):
        v, carry = velocity_fn(x, t, carry, inputs)
        return jnp.where(t > 1 - (steps - 0.5) / num_steps, v, 0.0), carry

      return euler_steps(until, noise, num_steps, *more)

    monkeypatch.setattr(flow, "euler_steps", stopped)
    sampler = Sampler(**common.get_config().sampler.to_dict() | settings)
    keep_k = golden[f"sample_{name}_keep"]
    return sample_latents(model, params, golden["tokens"], keep_k, golden["sample_init_noise"], sampler)

  after = [int(k.rpartition("after")[2]) for k in golden if k.startswith(f"sample_{name}_latent_after")]
  assert after
  for steps in after:
    close(run(steps), golden[f"sample_{name}_latent_after{steps}"], 1e-4)
  latents = run(settings["num_steps"])
  close(latents, golden[f"sample_{name}_latent"], 1e-4)
  close(decode(latents), golden[f"sample_{name}_image"], 1e-4)


@pytest.fixture(scope="module")
def loss_and_grads(model, params, golden):
  """(drop_condition) -> ((loss, loss per sample), gradients) of encoder and decoder at the golden draws."""

  def loss_fn(trained, drop):
    apply = lambda *args, method: model.apply({"params": {**params, **trained}}, *args, method=method)
    latents = apply(golden["images"], method="encode_latents")
    codes = apply(latents, method="encode")
    x_t = flow.add_noise(latents, golden["train_noise"], golden["train_sigma"])
    v = apply(x_t, golden["train_sigma"], codes, golden["train_keep"], drop, method="velocity")
    per_sample = flow.flow_loss(v, latents, golden["train_noise"])
    return per_sample.mean(), per_sample

  compiled = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  return lambda drop: compiled({k: params[k] for k in ("encoder", "decoder")}, drop)


@pytest.mark.parametrize("case", ["a", "b"])
def test_training_loss_and_gradients(loss_and_grads, golden, case):
  (loss, per_sample), grads = loss_and_grads(golden["train_b_dropmask"] if case == "b" else np.zeros(3, bool))
  close(per_sample, golden[f"train_{case}_loss_per_sample"], 1e-5)
  close(loss, golden[f"train_{case}_loss"][0], 1e-5)
  grads = golden_weights.to_official(grads)
  norms = {k.partition(".")[2]: v for k, v in golden.items() if k.startswith(f"train_{case}_gradnorm.")}
  whole = {k.partition(".")[2]: v for k, v in golden.items() if k.startswith(f"train_{case}_grad.")}
  assert len(norms) == 13 and len(whole) == 4
  for name, norm in norms.items():
    np.testing.assert_allclose(np.linalg.norm(grads[name]), norm[0], rtol=1e-4, err_msg=name)
  for name, grad in whole.items():
    np.testing.assert_allclose(grads[name], grad, rtol=0, atol=1e-4 * np.abs(grad).max(), err_msg=name)


@pytest.mark.parametrize("tag", LEVELS)
def test_fsq(units, tag):
  u, levels = {k.removeprefix(f"fsq_{tag}_"): v for k, v in units.items() if k.startswith(f"fsq_{tag}_")}, LEVELS[tag]
  assert tuple(u["levels"]) == levels
  close(fsq.bound(u["z"], levels), u["bound"], 2e-5)
  codes = fsq.quantize(u["z"], levels)
  np.testing.assert_array_equal(codes, u["codes"])
  np.testing.assert_array_equal(fsq.codes_to_ids(codes, levels), u["indices"])
  np.testing.assert_array_equal(fsq.ids_to_codes(u["lookup_ids"], levels), u["lookup_codes"])
  grad = jax.grad(lambda z: (fsq.quantize(z, levels) * u["grad_w"]).sum())(u["grad_z"])
  close(grad, u["grad"], 2e-5)


@pytest.mark.parametrize("case", ["above", "below", "eta", "nothr"])
def test_apg(units, case):
  """Three steps with one running sum."""
  cond, uncond, out, avg, params = (units[f"apg_{case}_{k}"] for k in ("cond", "uncond", "out", "avg", "params"))
  running = np.zeros_like(cond[0])
  for i in range(3):
    scale, momentum, eta, threshold = (float(x) for x in params)
    v, running = guidance.apg(cond[i], uncond[i], scale, running, momentum, eta, threshold)
    close(v, out[i], 2e-5)
    close(running, avg[i], 2e-5)


def test_cfg(units):
  close(guidance.cfg(units["cfg_cond"], units["cfg_uncond"], 3.0), units["cfg_out"], 2e-5)


@pytest.mark.parametrize(
  "kind, mode, scale",
  [
    ("logitnormal", "logit_normal", 0.0),
    ("stratified", "stratified_logit_normal", 0.0),
    ("uniform", "uniform", 0.0),
    ("mode0.25", "mode", 0.25),
    ("mode1.29", "mode", 1.29),
  ],
)
def test_noising(units, kind, mode, scale):
  t = flow.t_from_draw(jnp.asarray(units[f"rf_{kind}_draw"]), mode, scale)
  close(t, units[f"rf_{kind}_sigma"], 2e-5)
  close(flow.add_noise(units["rf_clean"], units["rf_noise"], t), units[f"rf_{kind}_x"], 2e-5)


# Nested dropout: the recorded frequencies are draws from our law; 5 standard errors are allowed.
DRAWS = 100_000


@pytest.fixture(scope="module")
def stats():
  stats = json.loads((SHARED / "golden" / "nested_dropout_stats.json").read_text())
  assert stats["draws"] == DRAWS and stats["N"] == 256
  return stats


def frequencies(num_registers, mode):
  return {k: p for k, p in enumerate(nested.length_distribution(mode, num_registers), 1) if p}


def assert_alike(ours, recorded):
  assert set(ours) == set(recorded)
  for k, p in recorded.items():
    assert abs(ours[k] - p) < 5 * np.sqrt(ours[k] * (1 - ours[k]) / DRAWS), (k, ours[k], p)


def test_nested_uniform(stats):
  ours, recorded = frequencies(256, "uniform"), stats["uniform"]
  assert (min(ours), max(ours), len(ours)) == (recorded["min"], recorded["max"], recorded["distinct"])
  error = np.sqrt((256**2 - 1) / 12 / DRAWS)
  assert abs(sum(k * p for k, p in ours.items()) - recorded["mean"]) < 5 * error
  for extreme in ("min_count", "max_count"):
    assert abs(recorded[extreme] - DRAWS / 256) < 5 * np.sqrt(DRAWS / 256)


@pytest.mark.parametrize("mode", ["pow2", "uniform_pow2"])
def test_nested_powers_of_two(stats, mode):
  assert_alike(frequencies(256, mode), {int(k): p for k, p in stats[mode].items()})


def test_nested_rounding_goes_up(stats):
  """The recorded rounding of single lengths, applied to 1..256, reproduces our distribution."""
  round_up = lambda k: k if k & (k - 1) == 0 else 1 << k.bit_length()
  assert all(round_up(int(k)) == up for k, up in stats["one_shift_bit_length"].items())
  expected = dict(zip(*np.unique([round_up(k) for k in range(1, 257)], return_counts=True)))
  assert_alike(frequencies(256, "uniform_pow2"), {int(k): n / 256 for k, n in expected.items()})


def test_nested_maximum_that_is_not_a_power_of_two(stats):
  """Where the reference draws 256 of 200 registers, which keeps all of them, ours draws 200."""
  recorded = {min(int(k), 200): p for k, p in stats["uniform_pow2_N200"].items()}
  assert_alike(frequencies(200, "uniform_pow2"), recorded)
  with pytest.raises(ValueError, match="200"):
    nested.length_distribution("pow2", 200)
