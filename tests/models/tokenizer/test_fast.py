"""The exact savings against the plain path, in float32: merged masked registers, sampler, buckets; and compile counts.

Single calls agree to 1e-5 of the largest value and 25 guided steps to 1e-4 (measured: 1e-6 and 1e-5); gradients to 1e-5
of the largest entry of the leaf.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

from flextok_jax import config as common
from flextok_jax.inference import programs
from flextok_jax.inference import tokenizer as api
from flextok_jax.models.tokenizer.flextok import Sampler, sample_latents
from flextok_jax.ops import guidance, nested
from flextok_jax.stages import make_stage
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.weights import loading

SAMPLER = Sampler(**common.get_config().sampler)
KEEP = np.array([1, 2, 7, 32, 255, 256])


def config_of(**overrides):
  """256 registers over 4 x 4 patches of 16 px pictures, in pixel space."""
  defaults = dict(image_size=16, dtype="float32", vae=dict(kind="pixels", scaling_factor=1.0))
  sections = dict(encoder=dict(width=64, depth=2, patch_size=4), decoder=dict(width=64, depth=2, patch_size=4))
  sections = {k: v | overrides.pop(k, {}) for k, v in sections.items()}
  return common.derive(**defaults | sections | overrides)


def fill(shapes, scale=0.2):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), shapes)


class Case:
  def __init__(self, **overrides):
    config = config_of(**overrides)
    self.model, self.params = make_model(config), fill(loading.abstract_params(config))
    rng = np.random.default_rng(1)
    self.x = rng.normal(size=(6, 16, 16, 3)).astype(np.float32)
    self.t = np.linspace(0.1, 1, 6, dtype=np.float32)
    self.codes = rng.uniform(-1, 1, (6, 256, 6)).astype(np.float32)
    self.ids = rng.integers(0, 64000, (6, 256)).astype(np.int32)

  @functools.cached_property
  def _velocity(self):
    return jax.jit(lambda params, *args: self.model.apply({"params": params}, *args, method="velocity"))

  def velocity(self, slots, keep_k, drop):
    return self._velocity(self.params, self.x, self.t, self.codes[:, :slots], keep_k, drop)

  @functools.cache  # noqa: B019
  def sampler(self, sampler, fast):
    """Returns the jitted sampler (params, ids, keep_k) -> latents."""
    return jax.jit(lambda params, ids, keep_k: sample_latents(self.model, params, ids, keep_k, self.x, sampler, fast))


@pytest.fixture(scope="module")
def case():
  return Case()


def near(actual, desired, relative):
  assert actual.shape == desired.shape
  actual, desired = jax.device_get((actual, desired))
  gap = np.abs(actual - desired).max() / np.abs(desired).max()
  assert gap < relative, gap


# Single calls.


@pytest.mark.parametrize("slots", nested.padded_lengths(256)[:-1])
def test_merged_registers(case, slots):
  """Samples with fewer kept registers than slots in one batch, the last one without condition."""
  keep_k = np.minimum(KEEP, slots - 1)
  drop = np.arange(6) == 5
  near(case.velocity(slots, keep_k, drop), case.velocity(256, keep_k, drop), 1e-5)


@pytest.mark.parametrize("null_condition", ["learned", "single", "zero"])
def test_one_null_token_replaces_all_registers(null_condition):
  case, drop = Case(decoder=dict(null_condition=null_condition)), np.ones(6, bool)
  near(case.velocity(1, KEEP, drop), case.velocity(256, KEEP, drop), 1e-5)


def test_tokens_past_keep_k_have_no_effect(case):
  keep_k, drop = np.minimum(KEEP, 39), np.zeros(6, bool)
  before = case.velocity(40, keep_k, drop)
  behind = np.arange(256) >= keep_k[:, None]
  changed = copy.copy(case)
  changed.codes = np.where(behind[..., None], 7.0, case.codes).astype(np.float32)
  np.testing.assert_array_equal(changed.velocity(40, keep_k, drop), before)


def test_fewer_registers_in_the_encoder(case):
  apply = lambda params, k: case.model.apply({"params": params}, case.x, k, method="encode_registers")
  encode = functools.partial(jax.jit(apply, static_argnums=1), case.params)
  everything = np.asarray(encode(None))
  for k in (1, 8, 33):
    near(encode(k), everything[:, :k], 1e-5)


def test_modulations_computed_in_advance(case):
  @jax.jit
  def with_and_without(params):
    apply = lambda *args, method: case.model.apply({"params": params}, *args, method=method)
    args = (case.x, np.full(6, 0.3, np.float32), case.codes, KEEP, np.zeros(6, bool))
    one = apply(np.float32([0.3]), method="modulations")
    return apply(*args, one, method="velocity"), apply(*args, method="velocity")

  near(*with_and_without(case.params), 1e-5)


# Registers that the attention does not see.


@pytest.fixture(scope="module")
def hiding():
  return Case(tokens=dict(mask="attention"))


@pytest.mark.parametrize("slots", [8, 40])
def test_hidden_registers(hiding, case, slots):
  keep_k, drop = np.minimum(KEEP, slots), np.arange(6) == 5
  plain = hiding.velocity(256, keep_k, drop)
  near(hiding.velocity(slots, keep_k, drop), plain, 1e-5)
  assert np.abs(plain - case.velocity(256, keep_k, drop))[:5].max() > 0.01  # another function than with mask tokens
  near(plain[5:], case.velocity(256, keep_k, drop)[5:], 1e-5)  # but the same without condition


def test_hidden_registers_are_as_if_they_were_absent(hiding, case):
  """In a model with as many registers as are kept, where mask tokens are nowhere needed."""
  few = case.model.clone(decoder=case.model.decoder.clone(num_registers=7))
  params = copy.deepcopy(case.params)
  params["decoder"]["register_positions"] = params["decoder"]["register_positions"][:7]
  seven, drop = np.full(6, 7), np.zeros(6, bool)
  inputs = case.x, case.t, case.codes[:, :7], seven, drop
  alone = jax.jit(lambda params: few.apply({"params": params}, *inputs, method="velocity"))(params)
  near(hiding.velocity(256, seven, drop), alone, 1e-5)


def test_25_steps_with_hidden_registers(hiding):
  keep_k = np.minimum(KEEP, 8)
  run = lambda fast, ids: hiding.sampler(SAMPLER, fast)(hiding.params, ids, keep_k)
  near(run(True, hiding.ids[:, :8]), run(False, hiding.ids), 1e-4)


# The sampler.


@pytest.mark.parametrize(
  "mode, scale, interval", [("apg", 7.5, (0, 1)), ("cfg", 3.0, (0, 1)), ("none", 7.5, (0, 1)), ("apg", 7.5, (0.2, 0.8))]
)
@pytest.mark.parametrize("slots", [8, 40, 256])
def test_25_steps(case, mode, scale, interval, slots):
  """8 slots run both halves in one call, more in two; 256 mixes all of KEEP in one batch."""
  keep_k = np.minimum(KEEP, slots - (slots < 256))
  sampler = dataclasses.replace(SAMPLER, guidance=mode, guidance_scale=scale, guidance_interval=interval)
  run = lambda fast, ids: case.sampler(sampler, fast)(case.params, ids, keep_k)
  near(run(True, case.ids[:, :slots]), run(False, case.ids), 1e-4)


def test_the_interval_of_guidance():
  assert guidance.guided_steps(25, (0.0, 1.0)) == (0, 25)
  assert guidance.guided_steps(4, (0.5, 0.75)) == (1, 3)  # t = 1, .75, .5, .25
  assert guidance.guided_steps(4, (0.3, 0.4)) == (0, 0)
  for bad in ((0.5, 0.2), (-0.1, 1), (0, 1.5)):
    with pytest.raises(ValueError, match="guidance_interval"):
      guidance.check_interval(bad)


def test_no_unconditional_pass_at_scale_one(case):
  """The compiled program of scale 1 does what that without guidance does; on the plain path guidance doubles it."""

  def flops(fast=True, **settings):
    sampler = dataclasses.replace(SAMPLER, num_steps=1, **settings)
    fn = lambda ids: sample_latents(case.model, case.params, ids, KEEP, case.x, sampler, fast)
    return jax.jit(fn).lower(case.ids).compile().cost_analysis()["flops"]

  plain = flops(guidance="none")
  assert flops(guidance_scale=1.0) == plain and flops(guidance_scale=2.0) > plain
  assert flops(guidance_scale=2.0, fast=False) > 1.9 * flops(guidance_scale=1.0, fast=False)
  assert flops(guidance_scale=2.0, guidance_interval=(0.0, 0.0)) == plain


# Training in buckets.


def bucket_config(mode, rows, depth, fast=True, **more):
  tokens = dict(nested_dropout=mode, null_prob=0.2, saturation_weight=0.3, num_registers=16, bucket_rows=rows, **more)
  return config_of(tokens=tokens, encoder=dict(depth=depth), decoder=dict(depth=depth), fast=fast)


@functools.cache
def loss_and_gradients(*args, **fields):
  """Returns the jitted function (params, latents) -> ((loss, metrics), gradients) of a bucket_config."""
  stage = make_stage(bucket_config(*args, **fields))
  return jax.jit(
    jax.value_and_grad(lambda params, latents: stage.latents_loss(params, latents, jax.random.key(3)), has_aux=True)
  )


def bucket_inputs(size, *args, **fields):
  """Returns the parameters of a bucket_config, and latents."""
  params = fill(loading.abstract_params(bucket_config(*args, **fields)))
  return params, np.random.default_rng(2).normal(size=(size, 16, 16, 3)).astype(np.float32)


@pytest.mark.parametrize(
  "size, mode, rows, depth, more",
  [
    (32, "pow2", 4, 1, {}),
    (16, "uniform", 16, 2, dict(quantization_dropout=0.5, corruption=0.3)),
    (6, "uniform_pow2", 6, 1, {}),
    (8, "pow2", 8, 1, dict(mask="attention")),
  ],
)
def test_buckets_have_the_plain_loss_and_gradients(size, mode, rows, depth, more):
  inputs = bucket_inputs(size, mode, rows, depth, **more)
  fast, plain = (loss_and_gradients(mode, rows, depth, fast=fast, **more)(*inputs) for fast in (True, False))
  ((loss, metrics), grads), ((plain_loss, plain_metrics), plain_grads) = jax.device_get((fast, plain))
  np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), metrics, plain_metrics)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(plain_grads)):
    if path[-1].key == "mask_token" and "mask" in more:
      assert not a.any() and not b.any()
      continue
    assert np.abs(b).max() > 0, jax.tree_util.keystr(path)
    assert np.abs(a - b).max() / np.abs(b).max() < 1e-5, jax.tree_util.keystr(path)


def test_buckets_over_devices():
  """Eight devices with whole groups compute the same as one, without communicating rows of the batch."""
  fn = loss_and_gradients("pow2", 4, 1, fast=True)  # the program of one device is compiled above
  params, latents = bucket_inputs(32, "pow2", 4, 1)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spread = jax.device_put(latents, NamedSharding(mesh, P("data")))
  everywhere = jax.device_put(params, NamedSharding(mesh, P()))
  ((loss, _), grads), ((one_loss, _), one_grads) = jax.device_get((fn(everywhere, spread), fn(params, latents)))
  np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), grads, one_grads)
  text = fn.lower(everywhere, spread).compile().as_text()
  moved = [line for line in text.splitlines() if any(op in line for op in (" all-gather(", " all-to-all("))]
  sizes = [np.prod([int(n) for n in line.split("[")[1].split("]")[0].split(",") if n]) for line in moved]
  assert max(sizes, default=0) < latents.size / 32, moved  # less than one picture


def test_buckets_run_less():
  """XLA counts at least a third fewer FLOPs, as in the analytic count (pow2, 9 rows)."""
  config = dict(tokens=dict(num_registers=64, bucket_rows=9), encoder=dict(depth=1), decoder=dict(depth=1))
  params = fill(loading.abstract_params(config_of(**config)))
  latents = np.zeros((9, 16, 16, 3), np.float32)

  def flops(fast):
    stage = make_stage(config_of(**config, fast=fast))
    grad = jax.grad(lambda p: stage.latents_loss(p, latents, jax.random.key(0))[0])
    return jax.jit(grad).lower(params).cost_analysis()["flops"]

  assert flops(True) < 0.67 * flops(False)


# Compile counts.


def test_all_counts_and_ragged_batches_compile_once_per_size():
  config = config_of(encoder=dict(depth=1), decoder=dict(depth=1), tokens=dict(num_registers=64))
  model = api.FlexTok(fill(loading.abstract_params(config)), FrozenConfigDict(config))
  images, noise = np.zeros((2, 16, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.float32)
  for f in (programs.tokenize, programs.detokenize, programs.velocity):
    f.clear_cache()
  for k in range(1, 65, 3):
    ids = model.tokenize(images, num_tokens=k)
    assert ids.shape == (2, k)
    model.velocity(noise, 0.5, ids, keep_k=k)
  counts = (1, 3, 7, 25, 30, 64)
  for k in counts:
    model.detokenize([np.zeros(k, int), np.zeros(1 + k // 2, int)], noise=noise, num_steps=1, guidance_scale=1.0 + k)
  sizes = len(nested.padded_lengths(64))
  assert programs.tokenize._cache_size() <= sizes and programs.velocity._cache_size() <= sizes
  assert programs.detokenize._cache_size() == len({nested.padded_length(k, 64) for k in counts})
