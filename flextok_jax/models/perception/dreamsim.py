"""DreamSim (Fu et al. 2023): a distance of images in the features of a vision transformer tuned to human judgements."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models.perception import vit

SIZE = 224  # pixels per side of the input of the network


class DreamSim(nn.Module):
  """The distance of single-branch networks of the dreamsim package with cls features, such as "dino_vitb16".

  Attributes:
    vit: the network, with the sizes and parameters of weights/perception/dreamsim.py. Its last norm only centres and
      scales.
  """

  vit: vit.ViT

  def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns 1 - cosine, float32 [b] from 0 to 2, of two batches of images as for embed."""
    return jnp.sum(jnp.square(self.embed(a) - self.embed(b)), axis=-1) / 2  # of unit vectors; exact near 0

  def embed(self, images: jax.Array) -> jax.Array:
    """images [b, h, w, 3] in [0, 1] -> float32 [b, d] of mean 0 and norm 1; see resize for their sizes."""
    with jax.default_matmul_precision("highest" if self.vit.dtype == jnp.float32 else None):
      x = self.vit((resize(images) - jnp.asarray(vit.IMAGENET[0])) / jnp.asarray(vit.IMAGENET[1]))["cls"]
    x = x.astype(jnp.float32)
    x -= jnp.mean(x, axis=-1, keepdims=True)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def resize(images: jax.Array) -> jax.Array:
  """Resizes both sides to SIZE pixels, ignoring their ratio, as the bicubic filter of Pillow for 8-bit images.

  The result along each axis is rounded to 8 bits, which has no gradient; images of SIZE pixels are not changed. Rows
  are filtered before columns, as in all versions of Pillow for images that are not taller than wide; for others Pillow
  13 may reverse the order.

  Args:
    images: float [b, h, w, 3] in [0, 1].

  Returns:
    float32 [b, SIZE, SIZE, 3] in [0, 1].
  """
  images = images.astype(jnp.float32)
  for axis in (2, 1):
    if images.shape[axis] != SIZE:
      shape = [*images.shape[:axis], SIZE, *images.shape[axis + 1 :]]
      images = jnp.round(jax.image.resize(images, shape, "cubic", antialias=True).clip(0, 1) * 255) / 255
  return images
