"""Per-image metrics: how a picture differs from its original, one number per image.

The plain ones (PSNR, SSIM, MAE) are of 8-bit images scaled to [0, 1]: they take two batches [b, h, w, c] of float32 in
[0, 1] and return float32 [b]. They are elementwise float32 arithmetic without matrix products, so accelerators do not
lower their precision. Distances (ops/distances.py) and networks (weights/perception/networks.py) join them by name.
"""

from collections.abc import Callable, Iterable, Mapping
import functools

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np

from flextok_jax.ops import distances
from flextok_jax.parallel.batching import Batched
from flextok_jax.weights.perception import networks

SSIM_WINDOW = 11  # pixels per side
SSIM_SIGMA = 1.5  # pixels
SSIM_K1, SSIM_K2 = 0.01, 0.03
MIN_MSE = 1e-10  # below the MSE of a difference of one level in one value of a 256 px image; bounds PSNR at 100 dB


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the peak signal-to-noise ratio in dB: data range 1, MSE over pixels and channels; 100 dB if equal."""
  mse = jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
  return -10 * jnp.log10(jnp.maximum(mse, MIN_MSE))


def mae(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the mean absolute error over pixels and channels, data range 1."""
  return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the structural similarity (Wang et al. 2004): mean over windows and channels, data range 1.

  Equal to skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5,
  use_sample_covariance=False, data_range=1, channel_axis=-1). The window is separable, so its (co)variance is the
  mean of the rows' (co)variances plus the (co)variance of the rows' means. E[x^2] - E[x]^2 would lose precision in
  flat regions.

  Raises:
    ValueError: an image is smaller than the 11x11 window.
  """
  if min(a.shape[1:3]) < SSIM_WINDOW:
    raise ValueError(f"SSIM needs images of {SSIM_WINDOW}x{SSIM_WINDOW} px or more, got {a.shape[1]}x{a.shape[2]}")
  row_a, row_b = _window_mean(_shifted(a, 2)), _window_mean(_shifted(b, 2))
  mean_a, mean_b = _window_mean(_shifted(row_a, 1)), _window_mean(_shifted(row_b, 1))

  def covariance(x, row_x, mean_x, y, row_y, mean_y):
    within = _window_mean([(u - row_x) * (v - row_y) for u, v in zip(_shifted(x, 2), _shifted(y, 2))])
    between = [(u - mean_x) * (v - mean_y) for u, v in zip(_shifted(row_x, 1), _shifted(row_y, 1))]
    return _window_mean(_shifted(within, 1)) + _window_mean(between)

  var_a = covariance(a, row_a, mean_a, a, row_a, mean_a)
  var_b = covariance(b, row_b, mean_b, b, row_b, mean_b)
  cov = covariance(a, row_a, mean_a, b, row_b, mean_b)
  c1, c2 = SSIM_K1**2, SSIM_K2**2
  luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
  structure = (2 * cov + c2) / (var_a + var_b + c2)
  return jnp.mean(luminance * structure, axis=(1, 2, 3))


METRICS = {"psnr": psnr, "ssim": ssim, "mae": mae}


def _of_unit_range(distance: distances.Distance) -> Callable:
  return lambda a, b: distance(2 * a - 1, 2 * b - 1)


# A pytree, so that a network's weights are arguments of a compiled function and not constants in it. Called with
# (a, b), both float32 [b, h, w, 3] in [0, 1], b rounded to 8 bits if it represents a stored picture; returns [b].
Metric = Partial

_PLAIN = METRICS | {name: _of_unit_range(f) for name, f in distances.DISTANCES.items()}
_NETWORKS = {
  "lpips_alex": lambda folder: networks.lpips(folder, "alex"),
  "lpips_vgg": lambda folder: networks.lpips(folder, "vgg"),
  "dreamsim": networks.dreamsim,
  "dinov2": networks.similarity,
}
NAMES = (*_PLAIN, *_NETWORKS)
HIGHER_IS_BETTER = ("psnr", "ssim", "dinov2")  # of the others, lower is better
TITLES = {
  "psnr": "PSNR dB",
  "ssim": "SSIM",
  "mae": "MAE",
  "mse": "MSE",
  "lpips_alex": "LPIPS alex",
  "lpips_vgg": "LPIPS vgg",
  "dreamsim": "DreamSim",
  "dinov2": "DINOv2 sim",
  "rfid": "rFID",
}
_DECIMALS = {"psnr": 2, "rfid": 2}  # in tables; the others have 4


def title(name: str) -> str:
  """Returns the name of a metric, with its unit if it has one, for tables and figures."""
  return TITLES.get(name, name)


def to_text(name: str, value: float) -> str:
  """Formats the value of a metric for tables."""
  return f"{value:.{_DECIMALS.get(name, 4)}f}"


def make_metrics(names: Iterable[str], weights: str | None = None) -> dict[str, Metric]:
  """Returns metrics by name, those of networks with their weights.

  Args:
    names: from NAMES.
    weights: folder with the weights of networks, see weights/perception/networks.py.

  Raises:
    ValueError: an unknown name, or a network without weights.
  """
  names = list(names)
  for name in names:
    if name not in NAMES:
      raise ValueError(f"unknown metric {name!r}: one of {', '.join(NAMES)}")
  return {name: _NETWORKS[name](weights) if name in _NETWORKS else Partial(_PLAIN[name]) for name in names}


def make_compare(
  metrics: Mapping[str, Metric], batch_size: int, mesh: jax.sharding.Mesh
) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
  """Returns a function (uint8 [n, h, w, 3], uint8 [n, h, w, 3]) -> {name of a metric: float32 [n]}."""

  def values(metrics, a, b):
    a, b = (x.astype(jnp.float32) / 255 for x in (a, b))
    return {name: metric(a, b) for name, metric in metrics.items()}

  batched = Batched(values, dict(metrics), batch_size, mesh, "images compared")

  def compare(a, b):
    found = batched(a, b)
    return {name: found[name] for name in metrics}  # jax sorts names

  return compare


def _shifted(x: jax.Array, axis: int) -> list[jax.Array]:
  """Returns the 11 views of x under a window sliding along an axis, each 10 shorter than x."""
  size = x.shape[axis] - SSIM_WINDOW + 1
  return [jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(SSIM_WINDOW)]


def _window_mean(views: list[jax.Array]) -> jax.Array:
  """Returns the Gaussian-weighted mean of the views of a window."""
  offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
  weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
  weights /= weights.sum()
  return functools.reduce(jnp.add, (float(w) * view for w, view in zip(weights, views)))
