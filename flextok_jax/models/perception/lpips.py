"""LPIPS (Zhang et al. 2018): a perceptual distance of images, by learned weights of the features of a classifier."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models.vae.autoencoder import conv
from flextok_jax.ops import layout

# For each of the five scales: the window of the max pooling of stride 2 before it (0: none), and its convolutions
# (index in `features` of torchvision, channels, kernel, stride, padding).
NETS = {
  "alex": (
    (0, ((0, 64, 11, 4, 2),)),
    (3, ((3, 192, 5, 1, 2),)),
    (3, ((6, 384, 3, 1, 1),)),
    (0, ((8, 256, 3, 1, 1),)),
    (0, ((10, 256, 3, 1, 1),)),
  ),
  "vgg": (
    (0, tuple((i, 64, 3, 1, 1) for i in (0, 2))),
    (2, tuple((i, 128, 3, 1, 1) for i in (5, 7))),
    (2, tuple((i, 256, 3, 1, 1) for i in (10, 12, 14))),
    (2, tuple((i, 512, 3, 1, 1) for i in (17, 19, 21))),
    (2, tuple((i, 512, 3, 1, 1) for i in (24, 26, 28))),
  ),
}
MIN_SIDES = {"alex": 31, "vgg": 16}  # pixels; smaller images vanish in a pooling
# Mean and standard deviation of the channels of ImageNet for images in [-1, 1], rounded as in the package.
_SHIFT, _SCALE = (np.array(x, np.float32) for x in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))


class LPIPS(nn.Module):
  """The distance of lpips.LPIPS(net, version="0.1"), differentiable in both images.

  If one image is a constant, its branch has no backward pass.

  Attributes:
    net: "alex", usual for reported distances, or "vgg", usual as a training loss.
    dtype: compute type of the convolutions; the rest is float32.
  """

  net: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns distances float32 [b] of two batches [b, h, w, 3] in [0, 1]; 0, up to rounding, for equal images.

    Raises:
      ValueError: the network is unknown, or the images are too small for it.
    """
    if self.net not in NETS:
      raise ValueError(f"unknown net {self.net!r}: one of {', '.join(NETS)}")
    if min(a.shape[1:3]) < MIN_SIDES[self.net]:
      raise ValueError(
        f"LPIPS of {self.net!r} needs images of {MIN_SIDES[self.net]} px per side or more, got "
        f"{a.shape[1]}x{a.shape[2]}: resize them"
      )
    features = _Features(self.net, self.dtype, name="features")
    total = jnp.zeros((), jnp.float32)
    for i, (x, y) in enumerate(zip(features(a), features(b))):
      head = self.param(f"head_{i}", nn.initializers.ones_init(), (x.shape[-1],))
      # [b, h', w', channels] -> [b]; not as a matrix product, whose precision accelerators lower
      total += jnp.mean(jnp.sum(head * jnp.square(_unit(x) - _unit(y)), axis=-1), axis=(1, 2))
    return total


class _Features(nn.Module):
  """Images [b, h, w, 3] in [0, 1] to the last activations of each scale, [b, h', w', channels]."""

  net: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images: jax.Array) -> list[jax.Array]:
    x = ((2 * images.astype(jnp.float32) - 1 - _SHIFT) / _SCALE).astype(self.dtype)
    scales = []
    with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else None):
      for window, convolutions in NETS[self.net]:
        if window:
          x = nn.max_pool(x, (window, window), (2, 2))
        for index, channels, kernel, stride, pad in convolutions:
          x = nn.relu(conv(channels, kernel, self.dtype, stride=stride, padding=pad, name=f"conv_{index}")(x))
        x = layout.constrain(x, "batch", None, None, None)
        scales.append(x)
    return scales


def _unit(x: jax.Array) -> jax.Array:
  """Divides by the norm over channels, in float32; where that is 0, the gradient is 0 instead of NaN."""
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  some = square > 0
  return x / (jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0) + 1e-10)
