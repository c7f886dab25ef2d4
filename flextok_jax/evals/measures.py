"""Per-image measures by name: how a picture differs from its original, for reports, studies and adaptive lengths."""

from collections.abc import Callable, Sequence

import jax

from flextok_jax.evals import distances, metrics

# (a, b) -> [batch]; both float32 [batch, h, w, 3] in [0, 1], b of 8 bits where it stands for a picture that is stored.
Measure = Callable[[jax.Array, jax.Array], jax.Array]

UNITS = {"psnr": "PSNR, dB", "ssim": "SSIM", "mae": "mean absolute error", "mse": "MSE", "perceptual": "perceptual"}
BETTER_HIGH = ("psnr", "ssim")  # of the others less is better


def make(names: Sequence[str], weights: str | None = None) -> dict[str, Measure]:
  """Returns measures by name, those of networks with their weights.

  Args:
    names: of metrics.METRICS and distances.DISTANCES.
    weights: folder with the weights of networks.

  Raises:
    ValueError: an unknown name.
  """
  found = {}
  for name in names:
    if name in metrics.METRICS:
      found[name] = metrics.METRICS[name]
    elif name in distances.DISTANCES:
      found[name] = _of_unit_range(distances.DISTANCES[name])
    else:
      known = (*metrics.METRICS, *distances.DISTANCES)
      raise ValueError(f"unknown metric {name!r}: one of {', '.join(known)}")
  return found


def _of_unit_range(distance: distances.Distance) -> Measure:
  return lambda a, b: distance(2 * a - 1, 2 * b - 1)
