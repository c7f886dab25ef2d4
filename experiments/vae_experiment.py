"""What does a discriminator change in the small VAE of configs/photos_vae.py? The table and the picture of docs/vae.md.

python -m experiments.vae_experiment DIR NAME,NAME,... PICTURE.png

DIR holds the workdir of each run. For each run, 256 held-out crops of photographs are reconstructed as 8-bit images
and measured, also relative to the first run: PSNR and SSIM; "perceptual" (ops/distances.py); "texture", which ignores
where a detail is; and the fraction of the original's contrast that remains at each scale, the finest first.

The texture of an image is a Gram matrix for each scale (Gatys et al. 2015): the mean over pixels of the products of
the "perceptual" features of structure, which are unit vectors at every pixel. The distance of two textures is the
root of the sum of squared differences over scales and products. The Fréchet distance of textures is that of Gaussians
of the 256 images' mean squares of features (the diagonals), like an FID without a network.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

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


def main(folder: str, names: str, picture: str):
  """Prints the measurements and draws the picture."""
  rows, columns = {}, {}
  for name in names.split(","):
    model = flextok_jax.load(f"{folder}/{name}/weights.safetensors")
    images = pipeline.eval_set(inputs.image_data(model.config), "photos", image_size=model.image_size, num_images=256)[
      "image"
    ]
    originals = images / np.float32(255)
    restored = images_lib.round_to_8bit(np.clip(model.decode_latents(model.encode_latents(images)), -1, 1))
    (grams, contrasts), (found, left) = measure_texture(originals), measure_texture(restored)
    rows[name] = {
      "PSNR": metrics.psnr(originals, restored),
      "SSIM": metrics.ssim(originals, restored),
      "perceptual": distances.perceptual(2 * originals - 1, 2 * restored - 1),
      "texture": jnp.square(grams - found).sum((1, 2, 3)) ** 0.5,
    }
    first = next(iter(rows.values()))
    for metric, values in rows[name].items():  # mean, and interval of the difference from the first run
      _, low, high = samples.mean_with_interval(np.asarray(values - first[metric]))
      print(f"{name}: {metric} {values.mean():.4f}, difference {low:.4f} to {high:.4f} (95%)", flush=True)
    print(
      f"{name}: texture Frechet {frechet.frechet_distance(*gaussian(found), *gaussian(grams)):.4f}, "
      f"contrast {np.asarray(left.mean(0) / contrasts.mean(0)).round(2)}",
      flush=True,
    )
    chosen = np.arange(0, 256, 256 // 8)[:8] + np.arange(8) % 4  # two of each photograph
    columns.setdefault("original", images[chosen])
    columns[name] = np.asarray(restored[chosen] * 255).round().astype(np.uint8)
  files.write_file(Path(picture), grids.to_png(grids.grid(list(columns.values()), list(columns))))


if __name__ == "__main__":
  cli.run(main, ["DIR", "NAMES", "PICTURE"])
