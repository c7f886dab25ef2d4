"""Sampling tokens: top-k and top-p against a loop and recorded probabilities, and chi-square tests of draws."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flextok_jax.ops import sampling
from tests.support import numpy_ar

KEY = jax.random.key(3)


def close(actual, desired, atol=1e-4):
  np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(
  "name, settings",
  [
    ("plain", {}),
    ("temp0.7", dict(temperature=0.7)),
    ("topk10", dict(top_k=10)),
    ("topk20_topp0.8_temp1.3", dict(top_k=20, top_p=0.8, temperature=1.3)),
    ("topp0.001", dict(top_p=0.001)),
    ("topp0.9", dict(top_p=0.9)),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_golden_probabilities(shared, name, settings):
  units = load_file(shared / "golden_ar" / "ar_sampling_units.safetensors")
  ours = jax.nn.softmax(sampling.filter_logits(units["logits"][:, 0], **settings))
  close(ours, units[f"probs_{name}"], 1e-6)
  np.testing.assert_array_equal(ours == 0, units[f"probs_{name}"] == 0)


def expected_probs(logits, temperature=1.0, top_k=0, top_p=None):
  """Probabilities of one vector of logits [v], token by token."""
  logits = [float(x) / temperature for x in logits]
  kept = list(range(len(logits)))
  if top_k:
    least = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
    kept = [i for i in kept if logits[i] >= least]
  mass = lambda ids: math.fsum(math.exp(logits[i] - max(logits)) for i in ids)
  if top_p is not None:
    whole = mass(kept)
    dropped, kept = [], sorted(kept, key=lambda i: logits[i])
    while len(kept) > 1 and mass([*dropped, kept[0]]) <= (1 - top_p) * whole:
      dropped.append(kept.pop(0))
    kept = [i for i in range(len(logits)) if logits[i] >= logits[kept[0]]]
  return np.array([math.exp(x - max(logits)) * (i in kept) for i, x in enumerate(logits)]) / mass(kept)


@pytest.mark.parametrize(
  "settings",
  [
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=40),
    dict(top_p=0.5),
    dict(top_p=1e-6),
    dict(top_p=1.0),
    dict(top_k=11, top_p=0.8, temperature=0.6),
  ],
  ids=str,
)
def test_top_k_and_top_p(settings):
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((6, 30)).astype(np.float32) * np.array([[0.1], [1], [1], [3], [9], [1]], np.float32)
  logits[2] = np.round(logits[2] * 2) / 2  # ties
  logits[5] = 1.0  # only ties
  ours = jax.nn.softmax(sampling.filter_logits(logits, **settings))
  for row, probs in zip(logits, ours):
    close(probs, expected_probs(row, **settings), 1e-6)
    np.testing.assert_array_equal(probs > 0, expected_probs(row, **settings) > 0)


def test_ties_at_the_threshold_of_top_k_stay():
  logits = jnp.array([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
  kept = jnp.isfinite(sampling.filter_logits(logits, top_k=2))
  np.testing.assert_array_equal(kept, [True, False, True, True, True, False])


def chi_square(tokens, probs):
  """(sum of squared errors over their expectation, its bound: 5 standard deviations above the mean)."""
  counts = np.bincount(np.asarray(tokens).ravel(), minlength=len(probs))
  assert not counts[probs == 0].any()
  expected = counts.sum() * probs[probs > 0]
  degrees = len(expected) - 1
  return ((counts[probs > 0] - expected) ** 2 / expected).sum(), degrees + 5 * math.sqrt(2 * degrees)


def test_distribution_of_sample():
  logits = np.random.default_rng(7).standard_normal(12).astype(np.float32)
  settings = dict(temperature=0.8, top_k=9, top_p=0.95)
  filtered = jnp.broadcast_to(sampling.filter_logits(logits, **settings), (20_000, 12))
  tokens = sampling.sample(jax.random.split(KEY, 20_000), filtered)
  probs = expected_probs(logits, **settings)
  assert 5 < (probs > 0).sum() < 9
  statistic, bound = chi_square(tokens, probs)
  assert statistic < bound
  wrong = expected_probs(logits, **{**settings, "temperature": 0.9})
  assert np.array_equal(wrong > 0, probs > 0) and chi_square(tokens, wrong)[0] > bound  # the test could fail


def test_distribution_of_generated_tokens():
  """The first token has the guided softmax; tokens one after another and samples side by side are independent."""
  gen, draws = numpy_ar.tiny_generator(depth=1), 8192
  kwargs = dict(labels=np.full(draws, 3), num_tokens=2, guidance_scale=1.5, temperature=1.3)
  first = gen.generate(KEY, **kwargs)[:, 0]
  read = lambda labels: np.float64(gen.logits(np.zeros((1, 1), int), labels))[0, 0]
  guided = read(None) + 1.5 * (read([3]) - read(None))
  statistic, bound = chi_square(first, expected_probs(guided, 1.3))
  assert statistic < bound
  assert chi_square(first, expected_probs(guided, 1.0))[0] > bound
  assert chi_square(first, expected_probs(read([3]), 1.3))[0] > bound

  readout = jax.tree.map(jnp.zeros_like, gen.params["ar"]["readout"])
  blind = dataclasses.replace(gen, params={**gen.params, "ar": {**gen.params["ar"], "readout": readout}})
  ids, log_probs = blind.generate(KEY, **kwargs, return_log_probs=True)
  close(log_probs, np.full((draws, 2), -math.log(24)))
  one, two = np.asarray(ids).T
  for pairs in (one * 24 + two, one[::2] * 24 + one[1::2]):
    statistic, bound = chi_square(pairs, np.full(576, 1 / 576))
    assert statistic < bound
