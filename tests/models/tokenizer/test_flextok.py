"""Properties of the tokenizer's networks on tiny random models; values are compared in tests/models/test_golden.py."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from flextok_jax import config as common
from flextok_jax.models.tokenizer.encoder import causal_last_mask
from flextok_jax.models.tokenizer.flextok import Sampler, sample_latents
from flextok_jax.ops import fsq
from flextok_jax.stages import make_stage
from flextok_jax.stages.tokenizer import make_model

PART = dict(width=32, depth=2, head_dim=16, patch_size=4)
PIXELS = dict(image_size=16, vae=dict(kind="pixels", scaling_factor=1.5), encoder=PART, decoder=PART)
TINY_VAE = dict(latent_channels=4, block_out_channels=(8, 8, 16), layers_per_block=1, norm_groups=4)
SMALL_VAE = TINY_VAE | dict(block_out_channels=(4, 8), norm_groups=2)
LATENT = dict(image_size=32, vae=TINY_VAE, encoder=PART | dict(patch_size=2), decoder=PART | dict(patch_size=2))
SETTINGS = dict(pixels=PIXELS, vae=LATENT)


def config_of(settings, **overrides):
  defaults = dict(dtype="float32", tokens=dict(num_registers=6, nested_dropout="uniform"), sampler=dict(num_steps=3))
  return common.derive(**{**defaults, **settings, **overrides})


def abstract_params(stage):
  """The whole tree, boxed with logical axes, as shapes."""
  params, frozen = jax.eval_shape(stage.init, jax.random.key(0))
  return {**params, **frozen}


def random_params(stage, seed=0):
  """Normals everywhere, so that every path counts; kernels of deviation 2 / sqrt(width), others 0.5, scales near 1."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    name = path[-1].key
    deviation = 2 * np.prod(x.shape[-2:-1] or (1,)) ** -0.5 if name == "kernel" else 0.5
    return jnp.asarray(rng.normal(size=x.shape) * deviation / (2 + (name == "scale")) + (name == "scale"), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, nn.unbox(abstract_params(stage)))


def random_images(n, size, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


class Tiny:
  """A pixel-space model of 6 registers with random parameters and inputs for 3 samples."""

  def __init__(self):
    self.config = config_of(PIXELS)
    self.stage = make_stage(self.config)
    self.model, self.params = self.stage.model, random_params(self.stage)
    rng = np.random.default_rng(1)
    self.latents = rng.normal(size=(3, 16, 16, 3)).astype(np.float32)
    self.ids = rng.integers(0, 64_000, (3, 6)).astype(np.int32)
    self.t = np.array([0.9, 0.05, 0.5], np.float32)
    self.keep_k = np.array([1, 3, 6], np.int32)

  @functools.cached_property
  def compiled_velocity(self):
    return jax.jit(functools.partial(self.model.apply, method="velocity"))

  def velocity(self, ids, keep_k, drop=(False, False, False)):
    codes = fsq.ids_to_codes(jnp.asarray(ids), self.config.tokens.levels)
    return np.asarray(
      self.compiled_velocity({"params": self.params}, self.latents, self.t, codes, keep_k, np.array(drop))
    )

  def scrambled(self, seed=2):
    """Other ids at and past keep_k."""
    other = np.random.default_rng(seed).integers(0, 64_000, self.ids.shape).astype(np.int32)
    return np.where(np.arange(6) < self.keep_k[:, None], self.ids, other)


@pytest.fixture(scope="module")
def tiny():
  return Tiny()


# The encoder is causal.


def test_mask_of_causal_last():
  seen = causal_last_mask(3, 4)
  patches, registers = seen[:3], seen[3:]
  assert patches[:, :3].all() and not patches[:, 3:].any()
  assert registers[:, :3].all() and (registers[:, 3:] == np.tri(4, dtype=bool)).all()


def test_token_i_depends_only_on_registers_up_to_i(tiny):
  """With two layers this also shows that patches attend to no register: otherwise register i would see later ones."""
  encoder = tiny.model.encoder.clone(parent=None)

  def encode(registers):
    params = tiny.params["encoder"] | {"registers": registers}
    return encoder.apply({"params": params}, [(tiny.latents[:1], None)])[0][0].sum(-1)

  jacobian = jax.jit(jax.jacrev(encode))(tiny.params["encoder"]["registers"])  # [6, 6, width]
  np.testing.assert_array_equal((jacobian != 0).any(-1), np.tri(6, dtype=bool))


@pytest.mark.parametrize("settings", SETTINGS)
def test_changing_a_register_changes_no_token_before_it(settings):
  stage = make_stage(config_of(SETTINGS[settings]))
  params, images = random_params(stage), random_images(4, stage.image_size)
  tokenize = jax.jit(stage.predict_fns["tokenize"])
  ids = np.asarray(tokenize(params, images))
  for j in range(6):
    registers = params["encoder"]["registers"].at[j].set(-3 * params["encoder"]["registers"][j] + 1)
    changed = np.asarray(tokenize(params | {"encoder": params["encoder"] | {"registers": registers}}, images))
    np.testing.assert_array_equal(changed[:, :j], ids[:, :j])
    assert (changed[:, j] != ids[:, j]).all()


def test_asking_for_k_tokens_gives_the_first_k(tiny):
  images = random_images(4, 16)

  @functools.partial(jax.jit, static_argnums=0)
  def ask(k):
    apply = functools.partial(tiny.model.apply, {"params": tiny.params})
    return apply(images, k, method="tokenize"), apply(apply(images, method="encode_latents"), k, method="encode")

  ids, codes = ask(None)
  assert len(np.unique(ids)) > 12
  for k in (1, 2, 5, 6):
    np.testing.assert_array_equal(ask(k)[0], ids[:, :k])
    np.testing.assert_allclose(ask(k)[1], codes[:, :k], atol=1e-6)


# Dropped codes have no effect.


def test_velocity_is_independent_of_dropped_codes(tiny):
  v, again = tiny.velocity(tiny.ids, tiny.keep_k), tiny.velocity(tiny.scrambled(), tiny.keep_k)
  assert (tiny.scrambled() != tiny.ids).sum() == 8
  np.testing.assert_array_equal(v, again)
  for position in range(6):  # and every kept code affects its own sample only
    ids = tiny.ids.copy()
    ids[:, position] += 1
    changed = (tiny.velocity(ids, tiny.keep_k) != v).any((1, 2, 3))
    np.testing.assert_array_equal(changed, position < tiny.keep_k)


@pytest.mark.parametrize("guidance", ["none", "cfg", "apg"])
def test_image_is_independent_of_dropped_codes(tiny, guidance):
  stage = make_stage(config_of(PIXELS, sampler=dict(num_steps=3, guidance=guidance, guidance_scale=3.0)))
  detokenize = jax.jit(stage.predict_fns["detokenize"])
  keys = jax.random.split(jax.random.key(0), 3)
  images = detokenize(tiny.params, tiny.ids, tiny.keep_k, keys)
  assert images.dtype == jnp.float32 and np.abs(images).max() <= 1
  np.testing.assert_array_equal(images, detokenize(tiny.params, tiny.scrambled(), tiny.keep_k, keys))
  other = np.asarray(detokenize(tiny.params, tiny.ids, np.array([2, 3, 5]), keys))
  np.testing.assert_array_equal((other != images).any((1, 2, 3)), [True, False, True])


def test_without_condition_codes_and_lengths_do_not_matter(tiny):
  everywhere = (True, True, True)
  v = tiny.velocity(tiny.ids, tiny.keep_k, everywhere)
  np.testing.assert_array_equal(v, tiny.velocity(tiny.ids + 1, np.array([6, 1, 2]), everywhere))
  mixed, conditional = tiny.velocity(tiny.ids, tiny.keep_k, (True, False, True)), tiny.velocity(tiny.ids, tiny.keep_k)
  np.testing.assert_array_equal(mixed[1], conditional[1])
  np.testing.assert_array_equal(mixed[[0, 2]], v[[0, 2]])
  assert (v != conditional).any((1, 2, 3)).all()


# Guidance.


@pytest.mark.parametrize("mode, scale, batch", [("none", 3.0, 3), ("cfg", 1.0, 3), ("apg", 1.0, 3), ("cfg", 3.0, 6)])
def test_no_unconditional_pass_without_guidance(tiny, mode, scale, batch):
  """Counts the samples that the decoder processes: 3, or twice as many with guidance."""
  seen = []

  class Spy(type(tiny.model)):
    def velocity(self, x_t, *args, **kwargs):
      seen.append(x_t.shape[0])
      return super().velocity(x_t, *args, **kwargs)

  fields = {k: getattr(tiny.model, k) for k in ("encoder", "decoder", "levels", "vae", "scaling_factor")}
  spy = Spy(**fields)
  settings = common.get_config().sampler.to_dict() | {"num_steps": 2}
  sample = lambda mode, scale: sample_latents(
    spy,
    tiny.params,
    tiny.ids,
    tiny.keep_k,
    jnp.asarray(tiny.latents),
    Sampler(**settings | {"guidance": mode, "guidance_scale": scale}),
  )
  out = sample(mode, scale)
  assert set(seen) == {batch}
  if batch == 3:
    np.testing.assert_array_equal(out, sample("none", 1.0))


def test_unknown_guidance(tiny):
  with pytest.raises(ValueError, match="'cgf'.*apg, cfg, none"):
    Sampler(**common.get_config().sampler.to_dict() | {"guidance": "cgf"})


# Options of the network.


def test_remat_names():
  make = lambda remat: make_model(ConfigDict(config_of(PIXELS).to_dict() | dict(remat=remat)))
  assert [make(name).encoder.remat for name in ("none", "dots", "full")] == ["none", "dots", "full"]


def test_bfloat16_computes_near_float32_with_float32_parameters(tiny):
  """bfloat16 keeps 8 bits: outputs differ by some percent of their size, and by more than float32's rounding."""
  coarse = make_stage(config_of(PIXELS, dtype="bfloat16"))
  assert {x.dtype for x in jax.tree.leaves(abstract_params(coarse))} == {jnp.dtype("float32")}
  codes = fsq.ids_to_codes(jnp.asarray(tiny.ids), tiny.config.tokens.levels)
  drop = np.array([False, False, True])

  def outputs(model):
    v = model.apply({"params": tiny.params}, tiny.latents, tiny.t, codes, tiny.keep_k, drop, method="velocity")
    return v, model.encoder.clone(parent=None).apply({"params": tiny.params["encoder"]}, [(tiny.latents, None)])[0]

  expected, actual = (jax.jit(functools.partial(outputs, model))() for model in (tiny.model, coarse.model))
  for a, b in zip(actual, expected, strict=True):
    assert a.dtype == jnp.float32 and np.isfinite(a).all()
    assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.05
  ids = jax.jit(coarse.predict_fns["tokenize"])(tiny.params, random_images(3, 16))
  assert ids.dtype == jnp.int32 and (ids >= 0).all() and (ids < 64_000).all()


@pytest.mark.parametrize(
  "settings, latent_shape",
  [
    (PIXELS | dict(image_size=24, tokens=dict(num_registers=1)), (24, 24, 3)),
    (PIXELS | dict(tokens=dict(num_registers=5, levels=(8, 6, 5), nested_dropout="uniform_pow2")), (16, 16, 3)),
    (PIXELS | dict(image_size=48, tokens=dict(num_registers=16), encoder=PART | dict(patch_size=16)), (48, 48, 3)),
    (LATENT | dict(image_size=20, vae=SMALL_VAE | dict(latent_channels=8)), (10, 10, 8)),
    (
      LATENT
      | dict(
        image_size=24,
        vae=SMALL_VAE | dict(latent_channels=16),
        tokens=dict(num_registers=2),
        encoder=PART | dict(patch_size=6),
        decoder=PART | dict(width=48, patch_size=3),
      ),
      (12, 12, 16),
    ),
  ],
  ids=lambda x: None if isinstance(x, dict) else "x".join(map(str, x)),
)
def test_sizes(settings, latent_shape):
  tokens = dict(dict(num_registers=4, nested_dropout="uniform"), **settings.get("tokens", {}))
  stage = make_stage(config_of(settings | dict(tokens=tokens)))
  n, size = tokens["num_registers"], settings.get("image_size", 16)
  levels = tokens.get("levels", (8, 8, 8, 5, 5, 5))
  assert stage.model.latent_shape(size, size) == latent_shape

  @jax.jit
  def everything(params, images, keep_k, keys):
    ids = stage.predict_fns["tokenize"](params, images)
    return (
      ids,
      stage.predict_fns["detokenize"](params, ids, keep_k, keys),
      stage.loss_fn(params, {"image": images}, keys[0], 0),
    )

  keys = jax.random.split(jax.random.key(0))
  ids, images, (loss, metrics) = everything(random_params(stage), random_images(2, size), np.array([1, n]), keys)
  assert ids.shape == (2, n) and ids.dtype == jnp.int32 and (ids >= 0).all() and (ids < np.prod(levels)).all()
  assert images.shape == (2, size, size, 3) and images.dtype == jnp.float32 and np.isfinite(images).all()
  assert loss.shape == () and np.isfinite(loss) and metrics["loss"][1] == 2


@pytest.mark.parametrize("settings", [*SETTINGS, "vae_stage"])
def test_logical_axes_are_named_at_every_parameter(settings):
  config = config_of(LATENT, stage="vae") if settings == "vae_stage" else config_of(SETTINGS[settings])
  boxes = jax.tree_util.tree_leaves_with_path(
    abstract_params(make_stage(config)), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  assert len(boxes) > 20
  scanned = 0
  for path, box in boxes:
    assert isinstance(box, nn.LogicallyPartitioned), jax.tree_util.keystr(path)
    assert len(box.names) == box.value.ndim and box.value.dtype == jnp.float32
    keys = {key.key for key in path if hasattr(key, "key")}
    if "blocks" in keys or ("adaln" in keys and "head" not in keys):  # the last block is separate
      assert box.names[0] == "layers" and box.value.shape[0] == (1 if "blocks" in keys else 2)
      scanned += 1
    else:
      assert "layers" not in box.names
  assert scanned == {"pixels": 12, "vae": 12, "vae_stage": 0}[settings]


@pytest.mark.parametrize(
  "overrides, words",
  [
    (dict(image_size=2), "image_size 2 gives 2 latent pixels"),
    (dict(image_size=18), "18 .*not a multiple of encoder.patch_size 4"),
    (dict(decoder=PART | dict(patch_size=3)), "decoder.patch_size 3"),
    (dict(encoder=PART | dict(head_dim=12)), "encoder.width 32 .*head_dim 12"),
    (dict(decoder=PART | dict(width=30, head_dim=10)), "decoder.width 30 is not a multiple of 4"),
    (dict(vae=TINY_VAE, image_size=18), "image_size 18 is not a multiple of the VAE's downscale 4"),
  ],
)
def test_sizes_that_do_not_fit_are_one_line(overrides, words):
  with pytest.raises(ValueError, match=words) as error:
    make_model(config_of(PIXELS | overrides))
  assert "\n" not in str(error.value)
