"""Metrics of sample sets against closed forms, brute force and other implementations."""

import numpy as np
import pytest
import scipy.stats
import sklearn

from flextok_jax.evals.metrics import samples as sample_metrics

RNG = np.random.default_rng


def test_inception_score_of_confident_and_of_uniform_predictions():
  sure = 1e4 * np.eye(5)[np.arange(100) % 5]
  np.testing.assert_allclose(sample_metrics.inception_score(sure, splits=4), [5, 0], atol=1e-9)
  unsure = np.tile(RNG(0).normal(size=5), (100, 1))
  np.testing.assert_allclose(sample_metrics.inception_score(unsure.astype(np.float32)), [1, 0], atol=1e-9)


def test_inception_score_is_the_difference_of_entropies():
  """log IS = H(y) - H(y|x), with scipy's entropy; splits have unequal sizes as in torch_fidelity."""
  logits = 3 * RNG(0).normal(size=(47, 9)).astype(np.float32)
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(1, keepdims=True)
  scores = []
  for i in range(5):
    part = p[i * 47 // 5 : (i + 1) * 47 // 5]
    scores.append(np.exp(scipy.stats.entropy(part.mean(0)) - scipy.stats.entropy(part, axis=1).mean()))
  np.testing.assert_allclose(sample_metrics.inception_score(logits, 5), [np.mean(scores), np.std(scores)], rtol=1e-12)
  with pytest.raises(ValueError, match="47 samples cannot be split into 48"):
    sample_metrics.inception_score(logits, 48)
  with pytest.raises(ValueError, match="not finite"):
    sample_metrics.inception_score(logits * np.nan, 5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("memory", [1024, 1e-3])  # MiB: one block, or a few rows at a time
def test_precision_and_recall_equal_brute_force(k, memory):
  real = RNG(1).normal(size=(60, 4)).astype(np.float32) + 50
  fake = (0.6 * RNG(2).normal(size=(45, 4)) + 50.3).astype(np.float32)

  def share(points, centres):
    inside = 0
    for x in points.astype(np.float64):
      for i, c in enumerate(centres.astype(np.float64)):
        others = np.delete(centres, i, axis=0)
        if np.linalg.norm(x - c) <= np.sort(np.linalg.norm(others - c, axis=1))[k - 1]:
          inside += 1
          break
    return inside / len(points)

  with sklearn.config_context(working_memory=memory):
    ours = sample_metrics.precision_recall(real, fake, k)
  assert ours == (share(fake, real), share(real, fake))
  assert ours[0] > ours[1]  # narrower: high precision, but incomplete coverage


def test_precision_and_recall_of_equal_and_of_distant_sets():
  real = RNG(0).normal(size=(20, 3))
  assert sample_metrics.precision_recall(real, real) == (1, 1)
  assert sample_metrics.precision_recall(real, real[:10])[0] == 1
  assert sample_metrics.precision_recall(real, real + 100) == (0, 0)
  half = np.concatenate([real[:10], real[10:] + 100])  # half of the samples are far away
  precision, recall = sample_metrics.precision_recall(real, half)
  assert precision == 0.5 and 0.5 <= recall <= 1


def test_precision_and_recall_reject_bad_input():
  good = RNG(0).normal(size=(20, 3))
  with pytest.raises(ValueError, match=r"\[20, 3\] and \[20, 2\]"):
    sample_metrics.precision_recall(good, good[:, :2])
  with pytest.raises(ValueError, match="3 nearest neighbours of 20 and 3 samples"):
    sample_metrics.precision_recall(good, good[:3])
  with pytest.raises(ValueError, match="not finite"):
    sample_metrics.precision_recall(good, good * np.nan)


def test_bootstrap_interval_matches_the_normal_approximation():
  values = RNG(0).exponential(size=2000)
  low, high = sample_metrics.bootstrap_interval(values, num=4000)
  error = values.std(ddof=1) / np.sqrt(2000)
  np.testing.assert_allclose([low, high], values.mean() + error * scipy.stats.norm.ppf([0.025, 0.975]), atol=error / 8)
  assert sample_metrics.bootstrap_interval(values, num=4000) == (low, high)
  narrow = sample_metrics.bootstrap_interval(values, level=0.5)
  assert low < narrow[0] < values.mean() < narrow[1] < high
  assert sample_metrics.bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_bootstrap_interval_rejects_bad_input():
  for values in ([1.0], [1.0, np.nan], np.ones((3, 3))):
    with pytest.raises(ValueError, match="2 finite values"):
      sample_metrics.bootstrap_interval(values)
  with pytest.raises(ValueError, match="level 95"):
    sample_metrics.bootstrap_interval(np.ones(3), level=95)


def test_clip_score():
  images = np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
  texts = np.array([[1.0, 0.0], [0.0, -1.0], [0.0, 5.0]])
  np.testing.assert_allclose(sample_metrics.cosine(images, texts), [1, -1, np.sqrt(0.5)])
  np.testing.assert_allclose(sample_metrics.clip_score(images, texts), [100, 0, 100 * np.sqrt(0.5)])
  with pytest.raises(ValueError, match="pairs"):
    sample_metrics.clip_score(images, texts[:2])
  with pytest.raises(ValueError, match="zero or not finite"):
    sample_metrics.cosine(images, 0 * texts)


def test_top1():
  logits = np.array([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0], [1.0, 1.0, 0.0]], np.float32)
  assert sample_metrics.top1(logits, np.array([1, 2, 0])).tolist() == [True, False, True]
  with pytest.raises(ValueError, match=r"labels of \[2\]"):
    sample_metrics.top1(logits, np.zeros(2, int))
  with pytest.raises(ValueError, match="0 to 3 are not among 3"):
    sample_metrics.top1(logits, np.array([0, 3, 1]))
  with pytest.raises(ValueError, match="not finite"):
    sample_metrics.top1(logits * np.nan, np.array([0, 1, 1]))
