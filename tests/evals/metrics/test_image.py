"""Per-image metrics against scikit-image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import skimage.metrics

from flextok_jax.evals.metrics import image as metrics


def pairs():
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (33, 47, 3))
  photo = skimage.data.astronaut()[:64, 60:124].astype(int)
  near = np.clip(photo + rng.integers(-9, 10, photo.shape), 0, 255)
  flat, dent = np.full((16, 16, 3), 255), np.full((16, 16, 3), 255)
  dent[:4, :4] = 254
  return {
    "noise": (noise, noise[::-1]),
    "near": (photo, near),
    "unlike": (photo, skimage.data.coffee()[:64, :64]),
    "flat": (flat, dent),
    "smallest": (noise[:11, :11], noise[:11, 20:31]),
  }


@pytest.mark.parametrize("name", pairs())
def test_metrics_equal_scikit_image(name):
  a, b = (x / 255 for x in pairs()[name])
  measure = jax.jit(lambda a, b: {k: f(a[None], b[None])[0] for k, f in metrics.METRICS.items()})
  ours = measure(np.float32(a), np.float32(b))
  ssim = skimage.metrics.structural_similarity(
    a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
  )
  np.testing.assert_allclose(ours["ssim"], ssim, atol=1e-6)
  np.testing.assert_allclose(ours["psnr"], skimage.metrics.peak_signal_noise_ratio(a, b, data_range=1), atol=2e-5)
  np.testing.assert_allclose(ours["mae"], np.abs(a - b).mean(), rtol=1e-5)


def test_metrics_of_equal_images_are_finite_and_per_image():
  a = jnp.zeros((2, 16, 16, 3))
  b = a.at[1].set(0.1)
  np.testing.assert_allclose(metrics.psnr(a, b), [100, 20], atol=1e-4)
  np.testing.assert_allclose(metrics.mae(a, b), [0, 0.1], atol=1e-6)
  assert metrics.ssim(a, b)[0] == 1 and metrics.ssim(a, b)[1] < 1


def test_ssim_rejects_images_smaller_than_its_window():
  with pytest.raises(ValueError, match="11x11"):
    metrics.ssim(jnp.zeros((1, 10, 16, 3)), jnp.zeros((1, 10, 16, 3)))
