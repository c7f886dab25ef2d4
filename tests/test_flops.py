"""Analytic FLOPs against XLA's count of the very programs that the benchmark runs."""

import jax
import jax.numpy as jnp
import pytest

from configs import common
from flextok_jax import benchmark, flops
from flextok_jax.training.state import unbox

BATCH = 8


def small_config(**overrides):
  """Wide enough that matrix products are nearly all of the work: 64 patches and up to 64 registers of width 384."""
  part = dict(width=384, depth=3)
  config = common.derive(
      image_size=32, dtype="float32", encoder=part, decoder=dict(part, width=448),
      vae=dict(block_out_channels=(64, 96), layers_per_block=1), tokens=dict(num_registers=64, bucket_rows=8),
      sampler=dict(num_steps=3))
  config.update(overrides)
  return config


@pytest.fixture(autouse=True)
def unrolled(monkeypatch):
  """Unrolls loops, as XLA counts the body of a loop once however often it runs; parameters are zeros, to be quick."""
  monkeypatch.setattr(jax.lax, "scan", lambda *args, scan=jax.lax.scan, **kw: scan(*args, **{**kw, "unroll": True}))

  def zeros(self, names, dtype):
    params, frozen = unbox(jax.eval_shape(self._stage(benchmark.ONLY).init, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), {name: {**params, **frozen}[name] for name in names})

  monkeypatch.setattr(benchmark.Benchmark, "_random_params", zeros)


def check(config, job, num_tokens=None, *, paths=benchmark.PATHS, latents=True, compiled=False):
  """Asserts that XLA counts up to 3% more, the share of elementwise work, and hardly less; returns our counts."""
  args, made = benchmark.Benchmark(config, paths, BATCH, latents).prepare(job, num_tokens)
  for path, (fn, count) in made.items():
    program = jax.jit(fn).lower(*args)
    program = program.compile() if compiled else program
    gap = program.cost_analysis()["flops"] / count - 1
    assert -0.002 < gap < 0.03, (job, num_tokens, path, gap)
  return {path: count for path, (_, count) in made.items()}


@pytest.mark.parametrize("job", ["tokenize", "detokenize"])
def test_inference(job):
  counts = [check(small_config(), job, num_tokens) for num_tokens in (1, 16, 64)]
  assert len({count["plain"] for count in counts}) == 1
  fast = [count["fast"] for count in counts]
  assert fast == sorted(set(fast)) and fast[0] < counts[0]["plain"] and fast[-1] <= counts[0]["plain"]


def test_training():
  counts = check(small_config(), "train")
  remat = check(small_config(remat=True), "train", paths=("fast",))
  assert counts["fast"] < 0.85 * counts["plain"] and 1.25 < remat["fast"] / counts["fast"] < 1.34
  accumulated = small_config(optim=dict(accumulate_steps=2))
  assert check(accumulated, "train", paths=("plain",))["plain"] == counts["plain"]


def test_compiled_programs():
  """What XLA makes of a program has the same FLOPs: it finds nothing to leave out that was counted."""
  config = small_config(encoder=dict(depth=2), decoder=dict(depth=2), sampler=dict(num_steps=2), remat=True)
  check(config, "tokenize", 8, compiled=True)
  check(config, "detokenize", 8, compiled=True)
  check(config, "train", paths=("plain",), compiled=True)


def test_the_vae_and_whole_images():
  config = small_config(vae=dict(latent_channels=4))
  vae = check(config, "vae")[benchmark.ONLY]
  check(small_config(stage="vae"), "train")
  share = 0
  for job in ("tokenize", "detokenize"):
    images = check(config, job, 8, paths=("fast",), latents=False)["fast"]
    share += images - check(config, job, 8, paths=("fast",))["fast"]
  assert share == vae
  check(config, "train", paths=("plain",), latents=False)


@pytest.mark.parametrize("fields", [
    dict(encoder=dict(gated_mlp=False, mlp_ratio=3.0), decoder=dict(patch_size=4, depth=1)),
    dict(decoder=dict(modulation="shared", head_modulation=False, null_condition="single")),
    dict(sampler=dict(guidance="none")),
    dict(sampler=dict(guidance_interval=(0.3, 0.7))),
    dict(sampler=dict(guidance="cfg", guidance_scale=1)),
    dict(vae=dict(kind="pixels"), encoder=dict(patch_size=4), decoder=dict(patch_size=4)),
])
def test_options(fields):
  config = small_config(**fields)
  if "sampler" not in fields:
    check(config, "tokenize", 8)
    check(config, "train", paths=("plain",))
  check(config, "detokenize", 8)


def test_formulas_by_hand():
  part = small_config(encoder=dict(width=64, depth=3, gated_mlp=False)).encoder
  assert flops.linear(2, 3, 4) == 48
  q, k, v, logits, weighted, out = (2 * 5 * 64 * 64, 2 * 9 * 64 * 64, 2 * 9 * 64 * 64, 2 * 5 * 9 * 64, 2 * 5 * 9 * 64,
                                    2 * 5 * 64 * 64)
  assert flops.attention(part, 5, 9) == q + k + v + logits + weighted + out
  assert flops.mlp(part, 5) == 2 * 5 * 64 * 256 * 2
  assert flops.blocks(part, 5, 9) == 2 * flops.block(part, 9, 9) + flops.block(part, 5, 9)
  assert flops.conv(4, 2, 3) == 2 * 10**2 * 2 * 3  # 3 taps at 2 pixels of an axis, 2 at both ends
  assert flops.conv(4, 2, 3, stride=2, low=0) == 2 * 5**2 * 2 * 3  # pixels 0 1 2 and 2 3


def test_the_released_size():
  """d12-d12: whole numbers, savings near what the sequence lengths promise, at no count of tokens a loss."""
  config = common.derive()
  plain = flops.sampler(config, 1, 4, False)
  fast = [flops.sampler(config, k, 4, True) for k in range(1, 257)]
  assert all(isinstance(n, int) for n in (plain, *fast)) and max(fast) < plain
  assert plain / fast[0] > 1.9
  assert flops.train(config, 16, False) / flops.train(config, 16, True) > 1.5
  assert flops.train(config, 32, True) == 2 * flops.train(config, 16, True)
