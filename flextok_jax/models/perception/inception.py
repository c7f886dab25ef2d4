"""The InceptionV3 of Google's graph of 2015-12-05, the network of FID, sFID and the inception score.

The same modules and names as in pytorch-fid and torch-fidelity, with every BatchNorm folded into the convolution before
it. It differs from the InceptionV3 of torchvision: average pools exclude the padding, the last block has a max pool,
and there are 1008 classes.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299  # pixels per side of the input of the network
SPATIAL_CHANNELS = 7  # of sFID, https://arxiv.org/abs/2103.03841
RESIZES = ("tensorflow", "pytorch")


def resize_images(images: jax.Array, resize: str) -> jax.Array:
  """Returns images [b, h, w, c] as [b, 299, 299, c] float32, bilinear without antialiasing.

  "tensorflow" aligns the centres of the first pixels, as TensorFlow 1 (align_corners=False, no half-pixel centres);
  "pytorch" aligns the edges of the images (align_corners=False there).
  """
  images = images.astype(jnp.float32)
  for axis in (1, 2):
    size = images.shape[axis]
    at, scale = np.arange(SIZE, dtype=np.float32), np.float32(size / SIZE)  # rounded as in the originals
    at = at * scale if resize == "tensorflow" else np.maximum((at + np.float32(0.5)) * scale - np.float32(0.5), 0)
    low = np.minimum(at.astype(int), size - 1)
    fraction = np.expand_dims(at - low.astype(np.float32), tuple(range(1, 4 - axis)))
    before, after = (jnp.take(images, i, axis, mode="clip") for i in (low, np.minimum(low + 1, size - 1)))
    images = before + (after - before) * fraction
  return images


def avg_pool(x: jax.Array) -> jax.Array:
  """Averages 3 x 3 windows of maps [b, h, w, c], without the padding at the edges."""
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def max_pool(x: jax.Array) -> jax.Array:
  """Max pooling of 3 x 3 windows with stride 2: [b, h, w, c] -> [b, (h - 1) // 2, (w - 1) // 2, c]."""
  # Slices: XLA on a CPU fuses the following operations with them, but not with lax.reduce_window.
  x = jnp.maximum(jnp.maximum(x[:, :-2:2], x[:, 1:-1:2]), x[:, 2::2])
  return jnp.maximum(jnp.maximum(x[:, :, :-2:2], x[:, :, 1:-1:2]), x[:, :, 2::2])


class Conv(nn.Module):
  """relu(pool(convolution) + bias), with float32 products on all devices.

  Attributes:
    padding: "SAME", or "VALID" for none.
    pool: avg_pool replaces averaging the input of a 1x1 convolution, max_pool a max pooling of the output: the same
      function for less work.
  """

  features: int
  kernel: tuple[int, int]
  stride: int = 1
  padding: str = "SAME"
  pool: Callable[[jax.Array], jax.Array] = lambda x: x

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (*self.kernel, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
    if self.kernel == (1, 1):  # XLA on a CPU has faster products than convolutions
      x = jnp.matmul(x, kernel[0, 0], precision=jax.lax.Precision.HIGHEST)
    else:
      x = self._convolve(x, kernel)
    return nn.relu(self.pool(x) + bias)

  def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    # XLA on a CPU takes up to five times as long without any padding, so a row is padded at the bottom. The outputs
    # that depend on it are dropped; with a stride of 2 there are none.
    padding: str | tuple[tuple[int, int], ...] = self.padding
    rows = None
    if padding == "VALID":
      padding, rows = ((0, 1), (0, 0)), (x.shape[1] - self.kernel[0]) // self.stride + 1
    x = jax.lax.conv_general_dilated(
      x,
      kernel,
      (self.stride, self.stride),
      padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=jax.lax.Precision.HIGHEST,
    )
    return x[:, :rows]


def conv(features: int, kernel: int | tuple[int, int], name: str, *args: Any, **kwargs: Any) -> Conv:
  """Returns a Conv; an integer kernel is square."""
  return Conv(features, (kernel, kernel) if isinstance(kernel, int) else kernel, *args, **kwargs, name=name)


class BlockA(nn.Module):
  """1x1, 5x5 and double 3x3 branches at 35 x 35."""

  pool_features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = conv(48, 1, "branch5x5_1")(x)
    z = conv(64, 1, "branch3x3dbl_1")(x)
    z = conv(96, 3, "branch3x3dbl_2")(z)
    return jnp.concatenate(
      [
        conv(64, 1, "branch1x1")(x),
        conv(64, 5, "branch5x5_2")(y),
        conv(96, 3, "branch3x3dbl_3")(z),
        conv(self.pool_features, 1, "branch_pool", pool=avg_pool)(x),
      ],
      -1,
    )  # [b, 35, 35, 224 + pool_features]


class BlockB(nn.Module):
  """From 35 x 35 to 17 x 17."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = conv(64, 1, "branch3x3dbl_1")(x)
    y = conv(96, 3, "branch3x3dbl_2")(y)
    return jnp.concatenate(
      [conv(384, 3, "branch3x3", 2, "VALID")(x), conv(96, 3, "branch3x3dbl_3", 2, "VALID")(y), max_pool(x)], -1
    )  # [b, 17, 17, 768]


class BlockC(nn.Module):
  """1x1, 7x7 and double 7x7 branches at 17 x 17; the large kernels are factorised into rows and columns."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    row, column, c = (1, 7), (7, 1), self.features
    y = conv(c, 1, "branch7x7_1")(x)
    y = conv(c, row, "branch7x7_2")(y)
    z = conv(c, 1, "branch7x7dbl_1")(x)
    z = conv(c, column, "branch7x7dbl_2")(z)
    z = conv(c, row, "branch7x7dbl_3")(z)
    z = conv(c, column, "branch7x7dbl_4")(z)
    return jnp.concatenate(
      [
        conv(192, 1, "branch1x1")(x),
        conv(192, column, "branch7x7_3")(y),
        conv(192, row, "branch7x7dbl_5")(z),
        conv(192, 1, "branch_pool", pool=avg_pool)(x),
      ],
      -1,
    )  # [b, 17, 17, 768]


class BlockD(nn.Module):
  """From 17 x 17 to 8 x 8."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = conv(192, 1, "branch3x3_1")(x)
    z = conv(192, 1, "branch7x7x3_1")(x)
    z = conv(192, (1, 7), "branch7x7x3_2")(z)
    z = conv(192, (7, 1), "branch7x7x3_3")(z)
    return jnp.concatenate(
      [conv(320, 3, "branch3x3_2", 2, "VALID")(y), conv(192, 3, "branch7x7x3_4", 2, "VALID")(z), max_pool(x)], -1
    )  # [b, 8, 8, 1280]


class BlockE(nn.Module):
  """Branches that end in parallel row and column kernels, at 8 x 8; `pool` is "average" or "maximum"."""

  pool: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = conv(384, 1, "branch3x3_1")(x)
    z = conv(448, 1, "branch3x3dbl_1")(x)
    z = conv(384, 3, "branch3x3dbl_2")(z)
    if self.pool == "average":
      pooled = conv(192, 1, "branch_pool", pool=avg_pool)(x)
    else:
      pooled = conv(192, 1, "branch_pool")(nn.max_pool(x, (3, 3), padding="SAME"))
    return jnp.concatenate(
      [
        conv(320, 1, "branch1x1")(x),
        conv(384, (1, 3), "branch3x3_2a")(y),
        conv(384, (3, 1), "branch3x3_2b")(y),
        conv(384, (1, 3), "branch3x3dbl_3a")(z),
        conv(384, (3, 1), "branch3x3dbl_3b")(z),
        pooled,
      ],
      -1,
    )  # [b, 8, 8, 2048]


class FIDInception(nn.Module):
  """Features of images.

  Attributes:
    resize: method of resizing to 299 x 299: "tensorflow" (the graph itself, the evaluator of ADM, torch-fidelity,
      torchmetrics) or "pytorch" (pytorch-fid). Their results differ and must not be compared.
  """

  resize: str = "tensorflow"

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    """Computes features of images [b, h, w, 3] in [0, 1], of any size, in float32 on all devices.

    Returns:
      {"pool": [b, 2048] for FID; "spatial": [b, 2023] for sFID, the first 7 channels of the 1x1 branch of Mixed_6d in
      the order row, column (17 each), channel, as in the evaluator of ADM; "logits": [b, 1008] for the inception score,
      without bias, as in the evaluator of ADM and in torch-fidelity}, all float32.

    Raises:
      ValueError: resize is unknown.
    """
    if self.resize not in RESIZES:
      raise ValueError(f"unknown resize {self.resize!r}: use one of {', '.join(RESIZES)}")
    x = resize_images(images, self.resize)  # [b, 299, 299, 3]
    x = (255 * x - 128) / 128 if self.resize == "tensorflow" else 2 * x - 1
    x = conv(32, 3, "Conv2d_1a_3x3", 2, "VALID")(x)
    x = conv(32, 3, "Conv2d_2a_3x3", 1, "VALID")(x)
    x = conv(64, 3, "Conv2d_2b_3x3", pool=max_pool)(x)  # [b, 73, 73, 64]
    x = conv(80, 1, "Conv2d_3b_1x1")(x)
    x = conv(192, 3, "Conv2d_4a_3x3", 1, "VALID", max_pool)(x)  # [b, 35, 35, 192]
    for name, features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
      x = BlockA(features, name=name)(x)
    x = BlockB(name="Mixed_6a")(x)
    for name, features in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160)):
      x = BlockC(features, name=name)(x)
    spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    x = BlockC(192, name="Mixed_6e")(x)
    x = BlockD(name="Mixed_7a")(x)
    x = BlockE("average", name="Mixed_7b")(x)
    x = BlockE("maximum", name="Mixed_7c")(x)
    pool = x.mean((1, 2))
    logits = nn.Dense(1008, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(pool)
    return {"pool": pool, "spatial": spatial, "logits": logits}
