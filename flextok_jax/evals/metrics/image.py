"""Image metrics, one number an image: PSNR, SSIM and MAE of 8-bit images scaled to [0, 1].

All take two batches [b, h, w, c] of float32 in [0, 1] and return float32 [b]; a report takes the mean over images.
They are plain elementwise float32 arithmetic (no matrix products), so accelerators do not lower their precision.
"""

import jax
import jax.numpy as jnp
import numpy as np

SSIM_WINDOW = 11  # pixels a side
SSIM_SIGMA = 1.5  # pixels
SSIM_K1, SSIM_K2 = 0.01, 0.03
MIN_MSE = 1e-10  # below the MSE of one level of difference in one value of a 256 px image; bounds PSNR at 100 dB


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio in dB, data range 1, MSE over pixels and channels; equal images give 100 dB."""
  mse = jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
  return -10 * jnp.log10(jnp.maximum(mse, MIN_MSE))


def mae(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean absolute error over pixels and channels, data range 1."""
  return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
  """Structural similarity (Wang et al. 2004), mean over windows inside the image and over channels; data range 1.

  The same number as skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5,
  use_sample_covariance=False, data_range=1, channel_axis=-1). The window is separable, so its (co)variance is the
  mean of the rows' (co)variances plus the (co)variance of the rows' means: no E[x^2] - E[x]^2, whose cancellation
  float32 does not survive in flat regions.

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


def _shifted(x: jax.Array, axis: int) -> list[jax.Array]:
  """The 11 views of x under a window sliding along an axis, each 10 shorter than x."""
  size = x.shape[axis] - SSIM_WINDOW + 1
  return [jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(SSIM_WINDOW)]


def _window_mean(views: list[jax.Array]) -> jax.Array:
  """Gaussian-weighted mean of the views of a window."""
  offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
  weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
  weights /= weights.sum()
  return sum(float(w) * view for w, view in zip(weights, views))
