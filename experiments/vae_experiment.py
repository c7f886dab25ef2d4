"""What does a discriminator change in a small VAE? The table and the picture of docs/vae.md.

python -m experiments.vae_experiment DIR NAME,NAME,... PICTURE.png

DIR holds the workdir of each run. For each run, 256 held-out images of each source of its config are reconstructed as
8-bit images and measured, also relative to the first run: PSNR and SSIM; "color", the mean distance of pixels in CIELAB
(CIE76); "perceptual" (ops/distances.py); "texture", which ignores where a detail is; and the fraction of the original's
contrast that remains at each scale, the finest first.

The texture of an image is a Gram matrix for each scale (Gatys et al. 2015): the mean over pixels of the products of
the "perceptual" features of structure, which are unit vectors at every pixel. The distance of two textures is the
root of the sum of squared differences over scales and products. The Fréchet distance of textures is that of Gaussians
of the 256 images' mean squares of features (the diagonals), like an FID without a network.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from skimage import color

import flextok_jax
from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.data import pipeline
from flextok_jax.evals import grids
from flextok_jax.evals.metrics import frechet, samples
from flextok_jax.evals.metrics import image as metrics
from flextok_jax.ops import distances
from flextok_jax.training import inputs


def scales(images):
  """Yields luminance and opponent colours [b, h, w, 3] of images in [-1, 1] at every scale of "perceptual"."""
  x = distances._opponent(images)
  yield x
  while min(x.shape[1:3]) >= 2 * distances.MIN_SIDE:
    x = distances._halve(x)
    yield x


@jax.jit
def measure_texture(images):
  """Returns Gram matrices [b, s, 16, 16] and contrasts [b, s] by scale, of images [b, h, w, 3] in [0, 1]."""
  grams, contrasts = [], []
  for x in scales(2 * images - 1):
    features = distances._features(x)[1]
    grams.append(jnp.einsum("bhwi,bhwj->bij", features, features) / (x.shape[1] * x.shape[2]))
    slopes = [distances._filter(distances._filter(x, distances._SLOPE, a), distances._SMOOTH, 3 - a) for a in (1, 2)]
    contrasts.append(sum(jnp.square(slope).mean((1, 2, 3)) for slope in slopes) ** 0.5)
  return jnp.stack(grams, 1), jnp.stack(contrasts, 1)


def gaussian(grams):
  """Returns mean and covariance, over images, of the diagonals."""
  features = np.diagonal(np.asarray(grams, np.float64), axis1=2, axis2=3).reshape(len(grams), -1)
  return features.mean(0), np.cov(features, rowvar=False)


def measure(name: str, source: str, originals: np.ndarray, restored: np.ndarray, first: dict | None) -> dict:
  """Prints the measurements of images [n, h, w, 3] in [0, 1], and differences from those of the first run.

  Returns:
    By metric, values [n].
  """
  (grams, contrasts), (found, left) = measure_texture(originals), measure_texture(restored)
  values = {
    "PSNR": metrics.psnr(originals, restored),
    "SSIM": metrics.ssim(originals, restored),
    "color": color.deltaE_cie76(color.rgb2lab(originals), color.rgb2lab(restored)).mean((1, 2)),
    "perceptual": distances.perceptual(2 * originals - 1, 2 * restored - 1),
    "texture": jnp.square(grams - found).sum((1, 2, 3)) ** 0.5,
  }
  for metric, of_images in values.items():
    line = f"{name}, {source}: {metric} {of_images.mean():.4f}"
    if first is not None:
      _, low, high = samples.mean_with_interval(np.asarray(of_images - first[metric]))
      line += f", difference {low:.4f} to {high:.4f} (95%)"
    print(line, flush=True)
  print(
    f"{name}, {source}: texture Frechet {frechet.frechet_distance(*gaussian(found), *gaussian(grams)):.4f}, "
    f"contrast {np.asarray(left.mean(0) / contrasts.mean(0)).round(2)}",
    flush=True,
  )
  return values


def main(folder: str, names: str, picture: str):
  """Prints the measurements and draws the picture."""
  runs = names.split(",")
  first: dict[str, dict] = {}
  columns: dict[str, list[np.ndarray]] = {}  # pictures [8, h, w, 3] by source: the originals, then those of each run
  for name in runs:
    model = flextok_jax.load(f"{folder}/{name}/weights.safetensors")
    data = inputs.image_data(model.config)
    for source in model.config.eval.sources:
      images = pipeline.eval_set(data, source, image_size=model.image_size, num_images=256)["image"]
      latents = model.encode_latents(images)
      restored = images_lib.round_to_8bit(np.clip(model.decode_latents(latents), -1, 1))
      measured = measure(name, source, images / np.float32(255), restored, first.get(source))
      first.setdefault(source, measured)
      chosen = np.arange(0, 256, 256 // 8)[:8]
      column = columns.setdefault(source, [images[chosen]])
      column.append(np.asarray(restored[chosen] * 255).round().astype(np.uint8))
  cells = sum(columns.values(), [])
  files.write_file(Path(picture), grids.to_png(grids.grid(cells, ["original", *runs] * len(columns))))


if __name__ == "__main__":
  cli.run(main, ["DIR", "NAMES", "PICTURE"])
