"""Metrics of sets of samples through what a network says of them: logits, features and embeddings, on the host."""

import numpy as np
import scipy.special
import scipy.stats

from flextok_jax.core import extras


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
  """Returns mean and standard deviation over splits of exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016, section 4).

  The score of n samples in a split is biased, so splits matter: 10 of 5000 samples are usual, consecutive ones as in
  ADM's evaluator. Samples ordered by class must be shuffled first (torch-fidelity does so by
  np.random.RandomState(2020).permutation(n)).

  Args:
    logits: [n, c]; the FID Inception's 1008, without their bias.
    splits: consecutive parts, of sizes that differ by 1 at most.

  Raises:
    ValueError: fewer samples than splits, or logits that are not finite.
  """
  if not 1 <= splits <= len(logits):
    raise ValueError(f"{len(logits)} samples cannot be split into {splits} parts: set fewer splits")
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
  """Returns the share of fakes among the reals, and of reals among the fakes (Kynkäänniemi et al. 2019, equation 2).

  A sample is among others when it is within one of the balls about each of them that just reach its k-th nearest
  neighbour, itself aside. Distances are Euclidean, in float64 (ADM's evaluator takes them in float16), and come block
  by block, of 1 GiB at most (scikit-learn's working_memory).

  Args:
    real, fake: features [n, d] and [m, d]; as many of both are usual, since the balls shrink with the number.

  Raises:
    ValueError: features that do not fit or are not finite, or no more than k of either.
  """
  real, fake = (np.asarray(x, np.float64) for x in (real, fake))
  if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
    raise ValueError(f"features of shapes {list(real.shape)} and {list(fake.shape)} are not [n, d] and [m, d]")
  if min(len(real), len(fake)) <= k:
    raise ValueError(f"{k} nearest neighbours of {len(real)} and {len(fake)} samples: more than k of both are needed")
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


def bootstrap_interval(values: np.ndarray, level: float = 0.95, num: int = 1000, seed: int = 0) -> tuple[float, float]:
  """Returns the percentile bootstrap interval of the mean of values [n] (Efron and Tibshirani 1993, chapter 13).

  Args:
    values: one a sample.
    level: share of the resampled means inside, half of the others on each side.
    num: resamplings.
    seed: of the resamplings.

  Raises:
    ValueError: fewer than two values, one that is not finite, or a level outside (0, 1).
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
    raise ValueError(
      f"an interval needs 2 finite values or more, got {values.shape} with {np.isfinite(values).sum()} finite"
    )
  if not 0 < level < 1:
    raise ValueError(f"level {level} is out of range: above 0 and below 1, as 0.95")
  batch = max(1, 2**22 // len(values))  # resamplings at once: 32 MiB
  result = scipy.stats.bootstrap(
    (values,),
    np.mean,
    n_resamples=num,
    batch=batch,
    vectorized=True,
    confidence_level=level,
    method="percentile",
    rng=np.random.default_rng(seed),
  )
  return float(result.confidence_interval.low), float(result.confidence_interval.high)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns the cosine between the rows of a and b, [n, d] each: [n] in [-1, 1], in float64.

  Raises:
    ValueError: shapes that do not fit, or a row that is zero or not finite.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.ndim != 2 or a.shape != b.shape:
    raise ValueError(f"features of shapes {list(a.shape)} and {list(b.shape)} are not pairs [n, d]")
  lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  if not (np.isfinite(lengths) & (lengths > 0)).all():
    raise ValueError("features are zero or not finite: the network or its inputs are broken")
  return (a * b).sum(1) / lengths


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
  """Returns 100 max(cos, 0) of each image with its text: CLIP embeddings [n, d] twice -> [n].

  Hessel et al. 2021 (equation 1), whose factor is 2.5; that of 100 is what reports of generators give.
  """
  return 100 * np.maximum(cosine(images, texts), 0)


def top1(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns whether the largest of logits [n, c] is that of labels [n]: bool [n]; of equal ones the first counts.

  Raises:
    ValueError: labels that do not fit the logits, or logits that are not finite.
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
