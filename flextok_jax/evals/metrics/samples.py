"""Metrics of sets of samples, from the logits, features or embeddings of a network; computed on the host."""

import numpy as np
import scipy.special
import scipy.stats

from flextok_jax.core import extras


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
  """Returns mean and standard deviation over splits of exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016, section 4).

  The score of a split is biased by its size, so the number of splits matters: usual are 10 splits of 5000 consecutive
  samples, as in ADM's evaluator. Samples ordered by class must be shuffled first (torch-fidelity uses
  np.random.RandomState(2020).permutation(n)).

  Args:
    logits: [n, c]; of the FID Inception c is 1008, without bias.
    splits: number of consecutive parts, whose sizes differ by at most 1.

  Raises:
    ValueError: fewer samples than splits, or logits that are not finite.
  """
  if not 1 <= splits <= len(logits):
    raise ValueError(f"{len(logits)} samples cannot be split into {splits} parts: use fewer splits")
  if not np.isfinite(logits).all():
    raise ValueError("logits are not finite: the network or its images are broken")
  edges = np.arange(splits + 1) * len(logits) // splits
  scores = []
  for start, end in zip(edges[:-1], edges[1:]):
    log_p = scipy.special.log_softmax(logits[start:end].astype(np.float64), axis=1)
    log_marginal = scipy.special.logsumexp(log_p, axis=0) - np.log(len(log_p))
    scores.append(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
  """Returns precision and recall of generated samples (Kynkäänniemi et al. 2019, equation 2).

  Precision is the fraction of fakes on the manifold of the reals, recall that of reals on the manifold of the fakes.
  The manifold is the union of balls around the samples, each with the distance to its k-th nearest neighbour as radius.
  Distances are Euclidean, in float64 (ADM's evaluator uses float16), in blocks of at most 1 GiB (scikit-learn's
  working_memory).

  Args:
    real, fake: features [n, d] and [m, d]; usually n = m, since the balls shrink with the number of samples.

  Raises:
    ValueError: features of wrong shapes or not finite, or at most k of either.
  """
  real, fake = (np.asarray(x, np.float64) for x in (real, fake))
  if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
    raise ValueError(f"features of shapes {list(real.shape)} and {list(fake.shape)} are not [n, d] and [m, d]")
  if min(len(real), len(fake)) <= k:
    raise ValueError(f"{k} nearest neighbours of {len(real)} and {len(fake)} samples: both need more than that")
  if not np.isfinite(real).all() or not np.isfinite(fake).all():
    raise ValueError("features are not finite: the network or its images are broken")
  centre = real.mean(0)  # distances are |a|^2 - 2ab + |b|^2, which rounds by the norms
  real, fake = real - centre, fake - centre
  real_radius, fake_radius = _radii(real, k), _radii(fake, k)
  among_real, among_fake = [], np.zeros(len(real), bool)
  start = 0
  for block in _distances(fake, real):
    end = start + len(block)
    among_real.append((block <= real_radius).any(1))
    among_fake |= (block <= fake_radius[start:end, None]).any(0)
    start = end
  return float(np.concatenate(among_real).mean()), float(among_fake.mean())


def bootstrap_interval(samples: np.ndarray, level: float = 0.95, num: int = 1000, seed: int = 0) -> tuple[float, float]:
  """Returns the percentile bootstrap interval of the mean of samples [n] (Efron and Tibshirani 1993, chapter 13).

  Args:
    samples: the values [n].
    level: fraction of the resampled means inside the interval; half of the others are on each side.
    num: number of resamplings.
    seed: of the resamplings.

  Raises:
    ValueError: fewer than 2 samples, a value that is not finite, or a level outside (0, 1).
  """
  samples = np.asarray(samples, np.float64)
  if samples.ndim != 1 or len(samples) < 2 or not np.isfinite(samples).all():
    raise ValueError(
      f"an interval needs at least 2 finite values, got {samples.shape} with {np.isfinite(samples).sum()} finite"
    )
  if not 0 < level < 1:
    raise ValueError(f"level {level} is out of range: it must be above 0 and below 1, such as 0.95")
  batch = max(1, 2**22 // len(samples))  # resamplings at once: 32 MiB
  result = scipy.stats.bootstrap(
    (samples,),
    np.mean,
    n_resamples=num,
    batch=batch,
    vectorized=True,
    confidence_level=level,
    method="percentile",
    rng=np.random.default_rng(seed),
  )
  return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mean_with_interval(samples: np.ndarray) -> list[float]:
  """Returns [mean, low, high] of samples [n] with the 95% interval of the mean; [mean] if n is 1."""
  mean = float(np.mean(samples, dtype=np.float64))
  return [mean, *bootstrap_interval(samples)] if len(samples) > 1 else [mean]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns the cosines [n] between the rows of a and b, both [n, d], in float64.

  Raises:
    ValueError: wrong shapes, or a row that is zero or not finite.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.ndim != 2 or a.shape != b.shape:
    raise ValueError(f"features of shapes {list(a.shape)} and {list(b.shape)} are not pairs [n, d]")
  lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  if not (np.isfinite(lengths) & (lengths > 0)).all():
    raise ValueError("features are zero or not finite: the network or its inputs are broken")
  return (a * b).sum(1) / lengths


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
  """Returns 100 max(cos, 0) [n] of the CLIP embeddings [n, d] of images and their texts.

  Hessel et al. 2021 (equation 1), where the factor is 2.5; reports of generators use 100.
  """
  return 100 * np.maximum(cosine(images, texts), 0)


def top1(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns whether the largest of logits [n, c] is at labels [n]: bool [n]; of equal logits the first counts.

  Raises:
    ValueError: labels that do not match the logits, or logits that are not finite.
  """
  logits, labels = np.asarray(logits), np.asarray(labels)
  if logits.ndim != 2 or labels.shape != logits.shape[:1]:
    raise ValueError(f"logits of shape {list(logits.shape)} and labels of {list(labels.shape)} are not [n, c] and [n]")
  if len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
    raise ValueError(f"labels from {labels.min()} to {labels.max()} are not among {logits.shape[1]} classes")
  if not np.isfinite(logits).all():
    raise ValueError("logits are not finite: the network or its images are broken")
  return logits.argmax(1) == labels


def _distances(*arguments, **options):
  metrics = extras.require("sklearn.metrics", "eval", "precision and recall")  # late: slow to import
  return metrics.pairwise_distances_chunked(*arguments, **options)


def _radii(features: np.ndarray, k: int) -> np.ndarray:
  """Returns each row's distance to the k-th nearest other row: [n]."""
  blocks = _distances(
    features, reduce_func=lambda block, _: np.partition(block, k, axis=1)[:, k]
  )  # the nearest is the row itself
  return np.concatenate(list(blocks))
