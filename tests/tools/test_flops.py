"""FLOPs counted in the benchmark's programs, against formulas and against XLA's count."""

import functools

import flax
from flax.core.meta import unbox
import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

from flextok_jax import config as common
from flextok_jax.core.flops import count as count_of
from flextok_jax.core.flops import count_jaxpr, equations
from flextok_jax.models.ar.sampling import SLOW_CHUNK
from flextok_jax.stages import make_stage
from flextok_jax.tools.benchmark import generator as benchmark_ar
from flextok_jax.tools.benchmark import jobs as benchmark_jobs
from tests.support import analytic_flops as flops
from tests.support import analytic_flops_ar as flops_ar

BATCH = 4


def small_config(**overrides):
  """64 patches and up to 64 registers; all widths differ."""
  part = dict(width=96, depth=3, head_dim=32)
  config = common.derive(
    image_size=32,
    dtype="float32",
    encoder=part,
    decoder=dict(part, width=128),
    vae=dict(block_out_channels=(32, 64), layers_per_block=1),
    tokens=dict(num_registers=64, bucket_rows=4),
    sampler=dict(num_steps=3),
  )
  config.update(overrides)
  return config


def generator(**overrides):
  """80 tokens: more than two chunks of the plain path, the last one not full."""
  config = common.derive(
    stage="ar",
    dtype="float32",
    ar=dict(width=64, depth=3, head_dim=32, num_ids=500, num_tokens=80, mlp_ratio=3.0),
    text=dict(features=48, mlp_hidden=40, max_length=12, depth=2, head_dim=16),
  )
  config.update(overrides)
  return config


@functools.cache
def _shapes(config):
  return unbox(jax.eval_shape(make_stage(config).init, jax.random.key(0)))


def shapes(config):
  """Returns shapes of the trained and the frozen parameters, which depend on neither training nor sampling."""
  defaults = common.get_config().to_dict()
  return _shapes(FrozenConfigDict(config.to_dict() | {k: defaults[k] for k in ("remat", "optim", "sampler")}))


@pytest.fixture(autouse=True)
def zero_params(monkeypatch):
  """Makes all parameters zero: the benchmark's random parameters depend on values, so they cannot be traced."""

  def zeros(self, names, dtype):
    params, frozen = shapes(self.config)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), {name: {**params, **frozen}[name] for name in names})

  monkeypatch.setattr(benchmark_jobs.TokenizerBenchmark, "_random_params", zeros)


def programs(config, job, num_tokens, paths, latents):
  """Returns {path: (program traced with shapes only, our count)}."""
  make = benchmark_ar.GeneratorBenchmark if config.stage == "ar" else benchmark_jobs.TokenizerBenchmark
  made = {}

  def prepare():
    args, by_path = make(config, paths, BATCH, latents).prepare(job, num_tokens)
    made.update(by_path)
    return args

  args = jax.eval_shape(prepare)
  return {path: (jax.jit(fn).trace(*args), count) for path, (fn, count) in made.items()}


def formula(config, job, num_tokens, path, latents):
  """Returns a job's FLOPs from the formulas in tests/support."""
  fast, parts = path == "fast", config.optim.accumulate_steps
  vae = not latents and config.vae.kind != "pixels"
  encode, decode = (f(config, BATCH) if vae else 0 for f in (flops.vae_encode, flops.vae_decode))
  if job == "ar":
    return flops_ar.ar_generate(config, num_tokens, BATCH, flops_ar.is_guided(config), fast)
  if job == "tokenize":
    return flops.tokenize(config, num_tokens, BATCH, fast) + encode
  if job == "detokenize":
    return flops.sampler(config, num_tokens, BATCH, fast) + decode
  if job == "vae":
    return flops.vae_encode(config, BATCH) + flops.vae_decode(config, BATCH)
  if config.stage == "ar":
    return flops_ar.ar_train(config, BATCH)
  if config.stage == "vae":
    return flops.train_vae(config, BATCH)
  return parts * flops.train(config, BATCH // parts, fast) + encode


def check(config, job, num_tokens=None, *, paths=benchmark_jobs.PATHS, latents=True, trips=()):
  """Asserts that the program's FLOPs, with loops multiplied out, equal the formulas; returns the counts."""
  made = programs(config, job, num_tokens, paths, latents)
  for path, (traced, count) in made.items():
    assert count == count_jaxpr(traced.jaxpr.jaxpr, trips)
    # The fast training step: the gradient of one learned vector at each of six codes.
    expected = formula(config, job, num_tokens, path, latents)
    assert count == pytest.approx(expected, rel=3e-6), (job, num_tokens, path)
  return {path: count for path, (_, count) in made.items()}


@pytest.mark.parametrize("job", ["tokenize", "detokenize"])
def test_inference(job):
  counts = [check(small_config(), job, num_tokens) for num_tokens in (1, 16, 64)]
  assert len({count["plain"] for count in counts}) == 1
  fast = [count["fast"] for count in counts]
  assert fast == sorted(set(fast)) and fast[0] < counts[0]["plain"] and fast[-1] <= counts[0]["plain"]


def test_a_grid():
  """The decoder costs the same for any number of tokens; its patches are half as large as the encoder's here."""
  grid = dict(layout="grid", num_registers=16, nested_dropout="none", bucket_rows=4)
  config = small_config(tokens=grid, encoder=dict(patch_size=4), decoder=dict(modulation="shared"))
  few, all_tokens = (check(config, "detokenize", count)["fast"] for count in (1, 16))
  assert few == pytest.approx(all_tokens, rel=0.01)
  check(config, "tokenize", 16)
  check(config, "train")


def test_training():
  counts = check(small_config(), "train")
  assert counts["fast"] < 0.85 * counts["plain"]
  full, dots = (check(small_config(remat=name), "train", paths=("fast",))["fast"] for name in ("full", "dots"))
  assert 1.25 < full / counts["fast"] < 1.34 and 1.03 < dots / counts["fast"] < 1.2
  accumulated = small_config(optim=dict(accumulate_steps=2))
  assert check(accumulated, "train", paths=("plain",))["plain"] == counts["plain"]


@pytest.mark.parametrize("job", ["tokenize", "detokenize", "train", "vae", "ar", "train_ar"])
def test_xla_count_agrees(job, monkeypatch):
  """XLA removes hardly any counted work and adds up to 3% of elementwise operations.

  Loops are unrolled, since XLA counts a loop's body once; a loop over tokens has one step. Sizes are chosen so that
  nearly all of the work is matrix products.
  """
  monkeypatch.setattr(jax.lax, "scan", lambda *args, scan=jax.lax.scan, **kw: scan(*args, **{**kw, "unroll": True}))
  part = dict(width=384, depth=2, head_dim=64)
  config = small_config(
    encoder=part, decoder=dict(part, width=448), sampler=dict(num_steps=2), remat="full" if job == "train" else "none"
  )
  if "ar" in job:
    config = generator(ar=dict(part, num_ids=64, num_tokens=8 if job == "ar" else 64, loss_chunk=64))
  elif job == "vae":
    config = small_config(vae=dict(block_out_channels=(64, 96)))
  num_tokens = {"tokenize": 8, "detokenize": 8, "ar": 1}.get(job)
  paths = ("plain",) if "train" in job else benchmark_jobs.PATHS
  for path, (traced, count) in programs(config, job.removesuffix("_ar"), num_tokens, paths, True).items():
    program = traced.lower().compile(compiler_options={"xla_disable_hlo_passes": "cse"})  # which undoes remat
    gap = program.cost_analysis()["flops"] / count - 1
    assert -0.002 < gap < 0.03, (path, gap)


def test_vae_training_losses():
  """LPIPS and the discriminator, with each gradient traced separately."""
  config = small_config(
    stage="vae",
    image_size=64,
    vae_loss=dict(lpips_weight=1.0, lpips="none"),
    discriminator=dict(weight=0.5, channels=8),
  )
  stage, images = make_stage(config), jnp.zeros((1, 64, 64, 3))
  trained, frozen = unbox(jax.eval_shape(stage.init_auxiliary, jax.random.key(0)))
  zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape), tree)
  lpips, params = ({"params": zeros(tree)} for tree in (frozen["lpips"], trained["discriminator"]))
  found = count_of
  distance = lambda x: stage.lpips.apply(lpips, x, images).sum()
  assert flops.perceptual_loss(config) == found(jax.grad(distance), images)
  logits = lambda params, x: stage.discriminator.apply(params, x).sum()
  forward, in_pixels = found(logits, params, images), found(jax.grad(logits, 1), params, images)
  in_weights, last = found(jax.grad(logits), params, images), flops.conv(64, config.vae.block_out_channels[0], 3)
  assert flops.adversarial_losses(config) == 2 * in_weights + in_pixels - forward + 2 * last
  without = small_config(stage="vae", image_size=64)
  more = flops.train_vae(config, 3) - flops.train_vae(without, 3)
  assert more == 3 * (flops.perceptual_loss(config) + flops.adversarial_losses(config))


def test_vae_and_whole_images():
  config = small_config(vae=dict(latent_channels=4))
  vae = check(config, "vae")[benchmark_jobs.ONLY]
  check(small_config(stage="vae"), "train")
  share = 0
  for job in ("tokenize", "detokenize"):
    images = check(config, job, 8, paths=("fast",), latents=False)["fast"]
    share += images - check(config, job, 8, paths=("fast",))["fast"]
  assert share == vae
  check(config, "train", paths=("plain",), latents=False)


@pytest.mark.parametrize(
  "fields",
  [
    dict(encoder=dict(gated_mlp=False, mlp_ratio=3.0), decoder=dict(patch_size=4, depth=1)),
    dict(decoder=dict(modulation="shared", head_modulation=False, null_condition="single")),
    dict(sampler=dict(guidance="none")),
    dict(sampler=dict(guidance_interval=(0.3, 0.7))),
    dict(sampler=dict(guidance="cfg", guidance_scale=1)),
    dict(vae=dict(kind="pixels"), encoder=dict(patch_size=4), decoder=dict(patch_size=4)),
  ],
)
def test_options(fields):
  config = small_config(**fields)
  if "sampler" not in fields:
    check(config, "tokenize", 8)
    check(config, "train", paths=("plain",))
  check(config, "detokenize", 8)


@pytest.mark.parametrize(
  "fields",
  [
    dict(),
    dict(ar=dict(condition="text", stop=True, ffn="mlp_gelu", bias=True), text=dict(encoder="bytes")),
    dict(ar=dict(condition="text", guidance_scale=1.0)),
    dict(ar=dict(condition="text"), text=dict(encoder="bytes"), remat="full"),
    dict(ar=dict(condition="text"), text=dict(encoder="bytes"), remat="dots"),
    dict(ar=dict(condition="none", pos_embed="sincos1d"), optim=dict(accumulate_steps=2)),
  ],
  ids=["class", "bytes", "t5", "remat full", "remat dots", "none"],
)
def test_generator(fields):
  """Fast: one loop with one step per token. Plain: one loop for each prefix length."""
  config = generator(**fields)
  check(config, "train")
  check(config, "ar", 20, paths=("plain",), trips=(20,))
  plain = check(config, "ar", 80, paths=("plain",), trips=(SLOW_CHUNK, SLOW_CHUNK, 80 - 2 * SLOW_CHUNK))["plain"]
  fast = check(config, "ar", 80, paths=("fast",), trips=(80,))["fast"]
  assert fast < plain / 15
  assert flops_ar.is_guided(config) == (config.ar.condition != "none" and config.ar.guidance_scale != 1)


def test_bytes_read_per_token():
  """All matrices once, except those used only for text, and the caches of guided rows, of 72 slots for 70 tokens."""
  config = generator(ar=dict(condition="text"))
  named = flax.traverse_util.flatten_dict(shapes(config)[0]["ar"])
  matrices = sum(x.size for path, x in named.items() if path[-1] == "kernel" and "kv" not in path)
  caches = 2 * BATCH * config.ar.depth * 2 * (72 + 12) * config.ar.width
  assert flops_ar.token_bytes(config, 70, BATCH, True) == 4 * (matrices + caches)
  config.dtype = "bfloat16"
  assert flops_ar.token_bytes(config, 70, BATCH, True) == 2 * (matrices + caches)


def test_logits_of_all_positions_are_never_materialised():
  """In the loss gradient at 12 x 768, arrays over the ids cover loss_chunk positions at most, or are weights."""
  most = {}
  for chunk in (16, 256):
    config = common.derive(stage="ar", ar=dict(loss_chunk=chunk))
    stage, whole = make_stage(config), jax.ShapeDtypeStruct((BATCH, 256), jnp.int32)
    rows = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    params = shapes(config)[0]
    grad = jax.grad(lambda params, batch, stage=stage: stage.loss_fn(params, batch, None, 0)[0])
    jaxpr = jax.make_jaxpr(grad)(params, {"token_ids": whole, "length": rows, "label": rows}).jaxpr
    sizes = [
      x.aval.size
      for eqn, _ in equations(jaxpr)
      for x in eqn.outvars
      if 64_000 in np.shape(x.aval) and 768 not in np.shape(x.aval)
    ]
    most[chunk] = max(sizes)
  assert most == {chunk: BATCH * chunk * 64_000 for chunk in (16, 256)}


def test_formulas_against_counts_by_hand():
  part = small_config(encoder=dict(width=64, gated_mlp=False)).encoder
  assert flops.linear(2, 3, 4) == 48
  q, k, v, logits, weighted, out = (
    2 * 5 * 64 * 64,
    2 * 9 * 64 * 64,
    2 * 9 * 64 * 64,
    2 * 5 * 9 * 64,
    2 * 5 * 9 * 64,
    2 * 5 * 64 * 64,
  )
  assert flops.attention(part, 5, 9) == q + k + v + logits + weighted + out
  assert flops.mlp(part, 5) == 2 * 5 * 64 * 256 * 2
  assert flops.blocks(part, 5, 9) == 2 * flops.block(part, 9, 9) + flops.block(part, 5, 9)
  assert flops.conv(4, 2, 3) == 2 * 10**2 * 2 * 3  # 3 taps at 2 pixels of an axis, 2 at both ends
  assert flops.conv(4, 2, 3, stride=2, low=0) == 2 * 5**2 * 2 * 3  # pixels 0 1 2 and 2 3


def test_released_size():
  """d12-d12: whole numbers, savings close to what the sequence lengths imply, and never a loss."""
  config = common.derive()
  plain = flops.sampler(config, 1, 4, False)
  fast = [flops.sampler(config, k, 4, True) for k in range(1, 257)]
  assert all(isinstance(n, int) for n in (plain, *fast)) and max(fast) < plain
  assert plain / fast[0] > 1.9
  assert flops.train(config, 16, False) / flops.train(config, 16, True) > 1.5
  assert flops.train(config, 32, True) == 2 * flops.train(config, 16, True)


def test_generator_at_the_released_size():
  """12 x 768: a token costs 2 FLOPs per weight and row plus the cache; recomputing 256 costs over 80 times that."""
  config = common.derive(stage="ar")
  blocks, readout = 12 * (4 * 768**2 + 3 * 768 * 2048), 768 * 64_000
  row = 2 * blocks + 12 * 2 * 2 * 768 * 256
  guided = 4 * 256 * (2 * row + 2 * readout)  # both rows share one readout
  assert flops_ar.ar_generate(config, 256, 4, True, True) == guided
  assert flops_ar.ar_generate(config, 256, 4, False, True) == 4 * 256 * (row + 2 * readout)
  assert 80 < flops_ar.ar_generate(config, 256, 4, True, False) / guided < 120
  assert flops_ar.token_bytes(config, 256, 1, True) == 2 * (blocks + readout + 12 * 2 * 2 * 768 * 256)
  assert flops_ar.ar_train(config, 8) == 2 * flops_ar.ar_train(config, 4)
