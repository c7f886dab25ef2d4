"""Times that depend on the number of latents (flow.base_size), in training and in the sampler."""

import jax
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.models.tokenizer import flextok
from flextok_jax.ops import flow
from flextok_jax.stages import make_stage
from flextok_jax.stages.distill import student_config
from flextok_jax.weights import fingerprints
from flextok_jax.weights.official.writer import to_official
from tests.support.runs import fails
from tests.support.tiny import VAE, latent_config, make_params, tiny_config

SCALED = dict(width=32, depth=1, head_dim=16, patch_size=4, posemb_scaling="scaled")
STEPS = 5


def config(base_size=0, **overrides):
  flow = dict(base_size=base_size, t_shift=1.5)
  return tiny_config(encoder=SCALED, decoder=SCALED, flow=flow, **overrides)


def model(base_size=0):
  cfg = config(base_size)
  return FlexTok(make_params(make_stage(cfg)), FrozenConfigDict(cfg))


def test_the_shift_is_the_root_of_the_ratio_of_latents():
  assert make_stage(config()).model.t_shift(64, 32) == 1.0
  assert make_stage(config(16)).model.t_shift(16, 16) == 1.0
  assert make_stage(config(16)).model.t_shift(32, 16) == pytest.approx(2**0.5)
  assert make_stage(latent_config(flow=dict(base_size=16))).model.t_shift(8, 8) == 1.0  # latents of a VAE


@pytest.mark.parametrize("shape", [(16, 16), (8, 16), (24, 16)])
def test_training_shifts_the_same_draws(shape):
  latents = np.zeros((8, *shape, 3), np.float32)

  def times(base_size):
    stage = make_stage(config(base_size))
    params = make_params(stage)
    return np.asarray(jax.jit(lambda x: stage._draw_rows(params, x, jax.random.key(1))[0].t)(latents))

  plain, s = times(0), np.sqrt(shape[0] * shape[1] / 16**2)
  if s == 1:
    np.testing.assert_array_equal(times(16), plain)
  else:
    np.testing.assert_allclose(times(16), s * plain / (1 + (s - 1) * plain), rtol=1e-5)
    assert (np.sign(times(16) - plain) == np.sign(s - 1)).all()


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_the_sampler_takes_the_steps_of_the_shifted_times(size):
  shifted, ids = model(16), np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
  noise = np.asarray(jax.random.normal(jax.random.key(0), (2, *size, 3)))
  settings = dict(noise=noise, num_steps=STEPS, guidance="none")
  found = shifted.detokenize(ids, **settings)
  s = np.sqrt(size[0] * size[1] / 16**2)
  t = np.arange(STEPS, -1, -1) / STEPS
  t = s * t / (1 + (s - 1) * t)
  x = noise
  for start, end in zip(t, t[1:]):
    x = x - (start - end) * np.asarray(shifted.velocity(x, float(start), ids))
  np.testing.assert_allclose(found, x, atol=2e-4)
  plain = np.asarray(model(0).detokenize(ids, **settings))
  if s == 1:
    np.testing.assert_array_equal(found, plain)
  else:
    assert np.abs(found - plain).max() > 1e-2


def test_steps_in_several_programs_are_the_same():
  cfg, ids = config(16), np.array([[1, 2, 3, 4]])
  network, params = make_stage(cfg).model, make_params(make_stage(cfg))
  noise = jax.random.normal(jax.random.key(0), (1, 24, 16, 3))
  sampler = flextok.Sampler(**{**cfg.sampler, "num_steps": STEPS, "guidance": "cfg", "guidance_scale": 2.0})
  keep_k = np.array([4], np.int32)

  def decode(size):
    step = lambda *args, **kwargs: flextok.sample_steps(network, params, ids, keep_k, *args, **kwargs)
    return jax.jit(lambda noise: flextok.sample_in_chunks(step, noise, sampler, size, True))(noise)

  np.testing.assert_allclose(decode(2), decode(STEPS), atol=1e-5)


def test_steps_without_lengths_are_equal():
  velocity = lambda x, t, carry, inputs: (t * x, carry)
  run = lambda lengths: flow.euler_steps(velocity, np.ones((1, 2)), 4, flow.step_times(4), None, None, lengths)[0]
  np.testing.assert_array_equal(run(None), run(np.full(4, 0.25, np.float32)))


def test_students_and_the_official_format_refuse_it():
  cfg = config(16)
  fails("a student has steps of equal length: set flow.base_size=0", make_stage, student_config(cfg, (1, 2)))
  params = make_params(make_stage(cfg))
  assert fingerprints.tokenizer(cfg, params) == fingerprints.tokenizer(config(), params)
  decoder = [fingerprints.tokenizer(c, params, decoder=True) for c in (cfg, config())]
  assert decoder[0] != decoder[1]
  latent = latent_config(flow=dict(base_size=16), vae=VAE)
  fails("flow.base_size must be 0, got 16", to_official, latent)
