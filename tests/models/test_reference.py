"""The JAX modules in float32 against the plain numpy statement in float64, on random weights; and numpy against golden.

Every parameter is filled with normals, those that start at zero too, so that every path counts. Tolerances are about
ten times the largest gap measured on a CPU: encoder 2e-6, VAE 5e-6, guidance 2e-6, time features 6e-5 (float32 steps of
angles up to 1000), and through them velocities 1e-4 and samples 5e-5 (3e-6 at t = 0), where values are about 4.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flextok_jax import config as common
from flextok_jax.models.tokenizer.flextok import Sampler, sample_latents
from flextok_jax.ops import flow, fsq, guidance, nested, posemb
from flextok_jax.stages.tokenizer import make_model
from tests.conftest import SHARED
from tests.support import golden_weights
from tests.support import numpy_reference as reference

ALL_LEVELS = [(8, 8, 8, 5, 5, 5), (8, 6, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5), (2, 3, 4)]
VAE_GROUPS = 4
CASES = {
  # Over a VAE: 32x48 images, 8x12 latents, 4x6 patches; the tables are for 48x48 images.
  "vae": dict(
    image_size=48,
    vae=dict(latent_channels=4, block_out_channels=(8, 16, 16), norm_groups=VAE_GROUPS),
    encoder=dict(width=64, depth=2),
    decoder=dict(width=128, depth=2),
    tokens=dict(num_registers=8),
  ),
  # Tokens on a grid of 3x3, four patches of the decoder each.
  "grid": dict(
    image_size=12,
    vae=dict(kind="pixels", scaling_factor=1.7),
    encoder=dict(width=64, depth=2, head_dim=32, patch_size=4),
    decoder=dict(width=64, depth=3, head_dim=32, patch_size=2, modulation="shared"),
    tokens=dict(layout="grid", num_registers=9, levels=(8, 6, 5), nested_dropout="none"),
  ),
  # In pixel space: 12x20 images, 3x5 patches of at most 5x5; heads of 32, where 8 / head_dim is not 1 / sqrt(head_dim).
  "pixels": dict(
    image_size=12,
    vae=dict(kind="pixels", scaling_factor=1.7),
    encoder=dict(width=128, depth=1, head_dim=32, patch_size=4, max_grid=5),
    decoder=dict(width=64, depth=3, head_dim=32, patch_size=4, max_grid=5),
    tokens=dict(num_registers=5, levels=(8, 6, 5)),
  ),
}
IMAGE_SHAPES = {"vae": (3, 32, 48, 3), "pixels": (3, 12, 20, 3), "grid": (3, 12, 12, 3)}


def gap(actual, desired, atol):
  """Asserts equal shapes and that the largest difference is below atol."""
  assert np.shape(actual) == np.shape(desired)
  difference = np.abs(np.asarray(actual, np.float64) - desired).max()
  assert difference < atol, difference


def fill(params, seed):
  """Replaces every leaf by normals: norm scales around 1, all else around 0 with deviation 0.1."""
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (rng.normal(size=x.shape) * 0.1 + (path[-1].key == "scale")).astype(np.float32), params
  )


class Case:
  """A model with random weights in both layouts, and inputs."""

  def __init__(self, name):
    config = common.derive(dtype="float32", **CASES[name])
    self.model, self.head_dim = make_model(config), config.encoder.head_dim
    self.levels, self.has_vae = tuple(config.tokens.levels), config.vae.kind != "pixels"
    self.scaling_factor = config.vae.scaling_factor
    square = jnp.zeros((1, config.image_size, config.image_size, 3))
    self.params = fill(nn.unbox(jax.eval_shape(self.model.init, jax.random.key(0), square))["params"], seed=1)
    self.w = reference.float64(golden_weights.to_official(self.params))
    rng = np.random.default_rng(2)
    self.images = rng.uniform(-1, 1, IMAGE_SHAPES[name]).astype(np.float32)
    latents = np.asarray(self.apply(self.images, method="encode_latents"))
    self.latents = rng.normal(size=latents.shape).astype(np.float32)
    self.noise = rng.normal(size=latents.shape).astype(np.float32)
    self.ids = rng.integers(0, np.prod(self.levels), (3, self.model.num_registers))
    self.codes = reference.fsq_lookup(self.ids, self.levels)
    self.keep_k = np.array([1, self.model.num_registers // 2, self.model.num_registers])
    self.null = np.array([False, True, False])
    self.t = np.array([0.9, 0.02, 0.5], np.float32)

  @functools.cached_property
  def compiled(self):
    return {
      method: jax.jit(functools.partial(self.model.apply, method=method))
      for method in ("encode_latents", "decode_latents", "tokenize", "velocity")
    }

  def apply(self, *args, method, params=None):
    return self.compiled[method]({"params": self.params if params is None else params}, *args)


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
  with jax.default_matmul_precision("highest"):
    yield Case(request.param)


# Models.


def test_latents_and_images(case):
  latents = case.apply(case.images, method="encode_latents")
  images = case.apply(case.latents, method="decode_latents")
  expected, decoded = case.images.astype(np.float64), case.latents / case.scaling_factor
  if case.has_vae:
    expected, _ = reference.vae_encode(case.w, expected, VAE_GROUPS)
    decoded = reference.vae_decode(case.w, case.latents / case.scaling_factor, VAE_GROUPS)
  gap(latents, expected * case.scaling_factor, 5e-5)
  gap(images, decoded, 5e-5)


def test_encoder(case):
  """All tokens, and only the first three: registers are causal."""
  expected = reference.encode(case.w, case.latents, case.head_dim)
  encoder = case.model.encoder.clone(parent=None)
  gap(jax.jit(encoder.apply)({"params": case.params["encoder"]}, [(case.latents, None)])[0], expected, 2e-5)
  first = jax.jit(lambda x: encoder.apply({"params": case.params["encoder"]}, [(x, 3)])[0])(case.latents)
  gap(first, expected[:, :3], 2e-5)


def test_tokens(case):
  mean = reference.vae_encode(case.w, case.images, VAE_GROUPS)[0] if case.has_vae else case.images
  z = reference.encode(case.w, mean * case.scaling_factor, case.head_dim)
  _, ids = reference.fsq_quantize(z, case.levels)
  edge = np.abs(reference.fsq_bound(z, case.levels) % 1 - 0.5).min()
  assert edge > 1e-5  # no value so near a rounding edge that float32 may take the other side
  np.testing.assert_array_equal(case.apply(case.images, method="tokenize"), ids)


@pytest.mark.parametrize("null", ["none", "some", "all"])
def test_velocity(case, null):
  null = {"none": np.zeros(3, bool), "some": case.null, "all": np.ones(3, bool)}[null]
  v = case.apply(case.latents, case.t, case.codes.astype(np.float32), case.keep_k, null, method="velocity")
  gap(v, reference.velocity(case.w, case.latents, case.t, case.codes, case.keep_k, null, case.head_dim), 1e-3)


@pytest.mark.parametrize("mode, scale", [("none", 1.0), ("cfg", 3.0), ("apg", 7.5)])
def test_sampler(case, mode, scale):
  settings = common.get_config().sampler.to_dict() | {"num_steps": 4, "guidance": mode, "guidance_scale": scale}
  sampler = Sampler(**settings)
  run = jax.jit(lambda noise: sample_latents(case.model, case.params, case.ids, case.keep_k, noise, sampler))
  expected = reference.sample(case.w, case.noise, case.codes, case.keep_k, 4, mode, scale, case.head_dim)
  gap(run(case.noise), expected[-1], 5e-4)


@pytest.mark.parametrize("case", ["vae", "grid"], indirect=True)
def test_gradients_are_finite_differences(case):
  """Along a random direction of all parameters: of the loss in the decoder, of a linear function in the encoder."""
  direction, eps = fill(case.params, seed=3), 1e-5
  along = reference.float64(golden_weights.to_official(direction))
  moved = lambda sign: {k: v + sign * eps * along[k] for k, v in case.w.items()}
  weights = np.random.default_rng(4).normal(size=(*case.ids.shape, len(case.levels))).astype(np.float32)
  encoder = case.model.encoder.clone(parent=None)

  def decoder_loss(params):
    x_t = flow.add_noise(case.latents, case.noise, case.t)
    v = case.apply(x_t, case.t, case.codes.astype(np.float32), case.keep_k, case.null, method="velocity", params=params)
    return flow.flow_loss(v, case.latents, case.noise).mean()

  def encoder_out(params):
    return (encoder.apply({"params": params["encoder"]}, [(case.latents, None)])[0] * weights).sum()

  def numpy_loss(w):
    v = reference.velocity(
      w,
      reference.add_noise(case.latents, case.noise, case.t.astype(np.float64)),
      case.t,
      case.codes,
      case.keep_k,
      case.null,
      case.head_dim,
    )
    return ((v - (case.noise - case.latents)) ** 2).mean()

  def numpy_out(w):
    return (reference.encode(w, case.latents, case.head_dim) * weights).sum()

  for ours, theirs in ((decoder_loss, numpy_loss), (encoder_out, numpy_out)):
    value, grads = jax.jit(jax.value_and_grad(ours))(case.params)
    products = jax.tree.map(lambda g, d: np.vdot(np.float64(g), d), grads, direction)
    expected = (theirs(moved(1)) - theirs(moved(-1))) / (2 * eps)
    np.testing.assert_allclose(value, theirs(case.w), rtol=1e-5)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=5e-4)  # 4e-5 measured


# Maths without parameters.


@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_fsq(levels):
  rng = np.random.default_rng(0)
  z = (rng.normal(size=(500, len(levels))) * 2).astype(np.float32)
  z[:3] = np.array([0, 20, -20])[:, None]
  gap(fsq.bound(z, levels), reference.fsq_bound(z, levels), 2e-5)
  codes, ids = reference.fsq_quantize(z, levels)
  sure = (np.abs(reference.fsq_bound(z, levels) % 1 - 0.5) > 1e-5).all(-1)  # float32 may round the others elsewhere
  assert sure.mean() > 0.99
  gap(fsq.quantize(z, levels)[sure], codes[sure], 1e-6)
  np.testing.assert_array_equal(fsq.codes_to_ids(fsq.quantize(z, levels), levels)[sure], ids[sure])
  np.testing.assert_array_equal(fsq.ids_to_codes(ids, levels), reference.fsq_lookup(ids, levels).astype(np.float32))
  weights = rng.normal(size=z.shape).astype(np.float32)
  grad = jax.grad(lambda z: (fsq.quantize(z, levels) * weights).sum())(z)
  gap(grad, reference.fsq_grad(z, weights, levels), 5e-5)  # at level 2 the shift is atanh(0.999), steep in float32


def test_positions_and_times():
  for height, width, dim in ((3, 5, 16), (8, 8, 64), (1, 7, 4)):
    gap(posemb.sincos_2d(height, width, dim), reference.sincos_2d(height, width, dim), 1e-6)
  np.testing.assert_array_equal(posemb.sincos_2d(3, 5, 16), posemb.sincos_2d(9, 9, 16)[:3, :5])
  t = np.linspace(0, 1, 101, dtype=np.float32)
  gap(posemb.timestep_features(t, 256), reference.timestep_features(t), 2e-4)


@pytest.mark.parametrize("mode", flow.T_SAMPLINGS)
def test_times_and_noising(mode):
  rng = np.random.default_rng(0)
  draw = (rng.normal(size=64) if mode == "logit_normal" else rng.uniform(size=64)).astype(np.float32)
  t = flow.t_from_draw(jnp.asarray(draw), mode, 0.4)
  gap(t, reference.t_from_draw(draw.astype(np.float64), mode, 0.4), 1e-5)
  x0, noise = rng.normal(size=(2, 64, 3, 2, 4)).astype(np.float32)
  gap(flow.add_noise(x0, noise, t), reference.add_noise(x0, noise, np.asarray(t, np.float64)), 1e-6)
  v = rng.normal(size=x0.shape).astype(np.float32)
  gap(flow.flow_loss(v, x0, noise), ((v - (noise - x0)) ** 2).mean((1, 2, 3)), 1e-5)


@pytest.mark.parametrize(
  "momentum, eta, threshold", [(-0.5, 0.0, 2.5), (-0.5, 0.3, 2.5), (-0.75, 0.0, 0.0), (0.0, 1.0, 0.0)]
)
def test_guidance(momentum, eta, threshold):
  rng = np.random.default_rng(0)
  ours = theirs = np.zeros((2, 4, 6, 5))
  for length in (1.0, 0.05, 1.0):  # the direction is longer than the threshold, shorter, longer
    v_c = rng.normal(size=ours.shape).astype(np.float32)
    v_u = (v_c - length * rng.normal(size=ours.shape)).astype(np.float32)
    gap(guidance.cfg(v_c, v_u, 3.0), reference.cfg(v_c.astype(np.float64), v_u, 3.0), 1e-5)
    v, ours = guidance.apg(v_c, v_u, 7.5, ours, momentum, eta, threshold)
    expected, theirs = reference.apg(v_c.astype(np.float64), v_u, 7.5, theirs, momentum, eta, threshold)
    gap(v, expected, 2e-5)
    gap(ours, theirs, 1e-5)
    if (eta, threshold, momentum) == (1.0, 0.0, 0.0):
      gap(v, reference.cfg(v_c.astype(np.float64), v_u, 7.5), 2e-5)  # no projection: classifier-free guidance


@pytest.mark.parametrize("num_registers", [1, 5, 16, 200, 256])
@pytest.mark.parametrize("mode", nested.MODES)
def test_kept_lengths_have_their_distribution(num_registers, mode):
  if mode == "pow2" and num_registers & (num_registers - 1):
    with pytest.raises(ValueError, match=str(num_registers)):
      nested.length_distribution(mode, num_registers)
    return
  lengths = np.arange(1, num_registers + 1)
  if mode == "pow2":
    lengths = 2 ** np.arange(num_registers.bit_length())
  if mode == "none":
    lengths = np.full(num_registers, num_registers)
  if mode == "uniform_pow2":
    lengths = np.minimum(2 ** np.ceil(np.log2(lengths)).astype(int), num_registers)
  expected = [(lengths == k).mean() for k in range(1, num_registers + 1)]
  np.testing.assert_allclose(nested.length_distribution(mode, num_registers), expected, atol=1e-12)


def test_masking():
  rng = np.random.default_rng(0)
  x, fill_value = rng.normal(size=(4, 6, 3)), rng.normal(size=3)
  expected = x.copy()
  for i, k in enumerate((0, 1, 5, 6)):
    expected[i, k:] = fill_value
  gap(nested.mask_tail(x, fill_value, jnp.array([0, 1, 5, 6])), expected, 1e-6)


# The numpy statement itself.


@pytest.mark.skipif(SHARED is None, reason="needs the golden set, ../shared/golden")
def test_numpy_matches_golden():
  """Tokens exactly; velocities and samples within float32's own error (1.5e-5 and 5e-6 measured)."""
  w = reference.float64(load_file(SHARED / "golden" / "flextok_tiny.safetensors"))
  golden = load_file(SHARED / "golden" / "flextok_tiny_io.safetensors")
  golden = {k: np.moveaxis(v, -3, -1) if v.ndim >= 4 else v for k, v in golden.items()}
  mean, _ = reference.vae_encode(w, golden["images"], 4)
  gap(mean * 0.18, golden["vae_latents"], 5e-5)
  z = reference.encode(w, mean * 0.18)
  gap(z, golden["enc_latents"], 5e-5)
  codes, ids = reference.fsq_quantize(z, (8, 8, 8, 5, 5, 5))
  np.testing.assert_array_equal(ids, golden["tokens"])
  gap(codes, golden["quants"], 1e-7)
  gap(reference.time_embedding(w, golden["temb_t"]), golden["temb_out"], 2e-4)
  x, t = golden["step_x"], golden["step_t"]
  for i in range(3):
    gap(reference.velocity(w, x, t, codes, golden[f"step_keep{i}"]), golden[f"step_v{i}"], 1e-4)
  gap(reference.velocity(w, x, t, codes), golden["step_v_nokeep"], 1e-4)
  null = golden["step_null_mixed_mask"]
  gap(reference.velocity(w, x, t, codes, golden["step_keep0"], null), golden["step_v_null_mixed"], 1e-4)
  gap(reference.velocity(w, x, t, codes, None, np.ones(3, bool)), golden["step_v_null"], 1e-4)
  for name, steps, mode, scale in (
    ("cfg", 25, "cfg", 3.0),
    ("apg", 25, "apg", 7.5),
    ("apg_full", 25, "apg", 7.5),
    ("noguid", 4, "none", 1.0),
  ):
    states = reference.sample(w, golden["sample_init_noise"], codes, golden[f"sample_{name}_keep"], steps, mode, scale)
    for key in golden:
      if key.startswith(f"sample_{name}_latent_after"):
        gap(states[int(key.rpartition("after")[2]) - 1], golden[key], 1e-4)
    gap(states[-1], golden[f"sample_{name}_latent"], 1e-4)
    gap(reference.vae_decode(w, states[-1] / 0.18, 4), golden[f"sample_{name}_image"], 1e-4)
  for train, null in (("a", None), ("b", golden["train_b_dropmask"])):
    loss = reference.flow_loss(
      w, golden["vae_latents"], codes, golden["train_sigma"], golden["train_noise"], golden["train_keep"], null
    )
    gap(loss, golden[f"train_{train}_loss_per_sample"], 1e-5)
