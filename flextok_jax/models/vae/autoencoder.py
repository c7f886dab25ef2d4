"""AutoencoderKL: images to latents and back; the same modules and names as in diffusers.

Encoder and decoder are called in two parts: FINE, whose features are larger than latents, and COARSE, whose features
have the size of latents and which attends to all positions. models/vae/tiling.py runs the first part tile by tile.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.ops import layout

_KERNEL_INIT = nn.initializers.lecun_normal()
COARSE, FINE = "coarse", "fine"
_MAX_QUERIES = 1024  # of attention at once, with as many keys: their weights take 4 MiB in float32
NORM_EPSILON = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution


def conv(
  features: int,
  kernel: int,
  dtype: jnp.dtype,
  *,
  stride: int = 1,
  padding: str | int | tuple[tuple[int, int], tuple[int, int]] = "SAME",
  use_bias: bool = True,
  kernel_init: nn.initializers.Initializer = _KERNEL_INIT,
  name: str | None = None,
) -> nn.Conv:
  """Returns a square convolution with named parameter axes."""
  return nn.Conv(
    features,
    (kernel, kernel),
    strides=(stride, stride),
    padding=padding,
    use_bias=use_bias,
    dtype=dtype,
    name=name,
    kernel_init=nn.with_logical_partitioning(kernel_init, ("conv_h", "conv_w", "conv_in", "conv_out")),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("conv_out",)),
  )


def group_norm(groups: int, name: str) -> nn.GroupNorm:
  """Returns a GroupNorm with float32 computation and output for any input dtype."""
  return nn.GroupNorm(
    groups,
    epsilon=NORM_EPSILON,
    dtype=jnp.float32,
    use_fast_variance=False,
    name=name,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("conv_out",)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("conv_out",)),
  )


class ResnetBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x if the number of channels changes."""

  channels: int
  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = nn.silu(group_norm(self.norm_groups, "norm1")(x))
    h = conv(self.channels, 3, self.dtype, name="conv1")(h)
    h = nn.silu(group_norm(self.norm_groups, "norm2")(h))
    h = conv(self.channels, 3, self.dtype, name="conv2")(h)
    if x.shape[-1] != self.channels:
      x = conv(self.channels, 1, self.dtype, name="conv_shortcut")(x)
    return layout.constrain(x + h, "batch", None, None, None)  # [b, h, w, channels]


class SpatialAttention(nn.Module):
  """Residual self-attention with one head over all positions of a feature map."""

  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape

    def linear(name: str) -> nn.Dense:
      return nn.Dense(
        c,
        dtype=self.dtype,
        name=name,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("conv_in", "conv_out")),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("conv_out",)),
      )

    # [b, h, w, c] -> [b, h * w, c]
    tokens = group_norm(self.norm_groups, "group_norm")(x).reshape(b, h * w, c)
    q, k, v = (linear(name)(tokens) for name in ("to_q", "to_k", "to_v"))

    def attend(q: jax.Array) -> jax.Array:
      # [b, queries, c], [b, h * w, c] -> [b, queries, h * w]
      logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * c**-0.5
      weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
      return jnp.einsum("bqk,bkc->bqc", weights, v)

    if h * w <= _MAX_QUERIES:
      out = attend(q)
    else:  # a part of the queries at a time, as all weights at once would take the square of the number of positions
      parts = -(-h * w * h * w // _MAX_QUERIES**2)
      rows = -(-h * w // parts)
      q = jnp.pad(q, ((0, 0), (0, parts * rows - h * w), (0, 0))).reshape(b, parts, rows, c).swapaxes(0, 1)
      out = jax.lax.map(attend, q).swapaxes(0, 1).reshape(b, parts * rows, c)[:, : h * w]
    # [b, h * w, c] -> [b, h, w, c]
    return x + linear("to_out")(out).reshape(b, h, w, c)


class MidBlock(nn.Module):
  """Resnet block, attention, resnet block at the coarsest level."""

  channels: int
  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = ResnetBlock(self.channels, self.norm_groups, self.dtype, name="resnet_0")(x)
    x = SpatialAttention(self.norm_groups, self.dtype, name="attention")(x)
    return ResnetBlock(self.channels, self.norm_groups, self.dtype, name="resnet_1")(x)


class DownBlock(nn.Module):
  """Resnet blocks, then a stride-2 convolution in all levels except the last."""

  channels: int
  num_layers: int
  downsample: bool
  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.num_layers):
      x = ResnetBlock(self.channels, self.norm_groups, self.dtype, name=f"resnet_{i}")(x)
    if self.downsample:  # padded at the bottom and right only, as in diffusers
      x = conv(self.channels, 3, self.dtype, stride=2, padding=((0, 1), (0, 1)), name="downsample")(
        x
      )  # [b, h/2, w/2, c]
    return x


class UpBlock(nn.Module):
  """Resnet blocks, then nearest-neighbour upsampling by 2 and a convolution in all levels except the last."""

  channels: int
  num_layers: int
  upsample: bool
  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, parts: Sequence[str] = (COARSE, FINE)) -> jax.Array:
    if COARSE in parts:
      for i in range(self.num_layers):
        x = ResnetBlock(self.channels, self.norm_groups, self.dtype, name=f"resnet_{i}")(x)
    if self.upsample and FINE in parts:
      x = x.repeat(2, axis=1).repeat(2, axis=2)  # [b, 2h, 2w, c]
      x = conv(self.channels, 3, self.dtype, name="upsample")(x)
    return x


class Encoder(nn.Module):
  """FINE: images [b, h, w, 3] to features [b, h/f, w/f, c]; COARSE: these to features [b, h/f, w/f, out_channels]."""

  out_channels: int
  block_out_channels: Sequence[int]
  layers_per_block: int
  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, part: str) -> jax.Array:
    last = len(self.block_out_channels) - 1
    if part == FINE:
      x = conv(self.block_out_channels[0], 3, self.dtype, name="conv_in")(x)
    for i, channels in enumerate(self.block_out_channels):
      if (part == FINE) == (i < last):
        x = DownBlock(channels, self.layers_per_block, i < last, self.norm_groups, self.dtype, name=f"down_{i}")(x)
    if part == FINE:
      return x
    x = MidBlock(self.block_out_channels[-1], self.norm_groups, self.dtype, name="mid")(x)
    x = nn.silu(group_norm(self.norm_groups, "conv_norm_out")(x))
    return conv(self.out_channels, 3, self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
  """COARSE: latents [b, h/f, w/f, c] to features [b, h/f, w/f, channels]; FINE: these to images [b, h, w, 3].

  FINE also returns the features [b, h, w, channels] that conv_out reads.
  """

  block_out_channels: Sequence[int]
  layers_per_block: int
  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, part: str) -> Any:
    last = len(self.block_out_channels) - 1
    blocks = [
      UpBlock(channels, self.layers_per_block + 1, i < last, self.norm_groups, self.dtype, name=f"up_{i}")
      for i, channels in enumerate(reversed(self.block_out_channels))
    ]
    if part == COARSE:
      x = conv(self.block_out_channels[-1], 3, self.dtype, name="conv_in")(x)
      x = MidBlock(self.block_out_channels[-1], self.norm_groups, self.dtype, name="mid")(x)
      return blocks[0](x, (COARSE,))
    x = blocks[0](x, (FINE,))
    for block in blocks[1:]:
      x = block(x)
    x = nn.silu(group_norm(self.norm_groups, "conv_norm_out")(x))
    return last_conv(self.dtype, name="conv_out")(x), x


def last_conv(dtype: jnp.dtype, name: str | None = None) -> nn.Conv:
  """Returns the last layer of the decoder."""
  return conv(3, 3, dtype, name=name)


class AutoencoderKL(nn.Module):
  """KL autoencoder; latents are unscaled, the caller applies a scaling factor.

  Attributes:
    latent_channels: c.
    block_out_channels: channels of each level; the sides are halved after all levels except the last.
    layers_per_block: resnet blocks per level in the encoder; one more in the decoder.
    norm_groups: groups of all GroupNorms; must divide all entries of block_out_channels.
    dtype: compute type of convolutions and projections; parameters, norms, softmax and outputs are float32.
  """

  latent_channels: int
  block_out_channels: Sequence[int]
  layers_per_block: int = 2
  norm_groups: int = 32
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    sizes = (self.block_out_channels, self.layers_per_block, self.norm_groups, self.dtype)
    self.encoder = Encoder(2 * self.latent_channels, *sizes)
    self.decoder = Decoder(*sizes)
    self.quant_conv = conv(2 * self.latent_channels, 1, self.dtype)
    self.post_quant_conv = conv(self.latent_channels, 1, self.dtype)

  @property
  def downscale(self) -> int:
    """Image pixels per latent pixel, along each side."""
    return 2 ** (len(self.block_out_channels) - 1)

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the posterior of images [b, h, w, 3] in [-1, 1].

    Returns:
      mean and logvar, each [b, h/f, w/f, c] float32, f = downscale.

    Raises:
      ValueError: height or width is not a multiple of f.
    """
    return self.encode_coarse(self.encode_fine(images))

  def encode_fine(self, images: jax.Array) -> jax.Array:
    """images [b, h, w, 3] -> features [b, h/f, w/f, channels]; raises ValueError as encode."""
    self.check_size(*images.shape[1:3])
    return self.encoder(images, FINE)

  def check_size(self, height: int, width: int) -> None:
    """Raises ValueError unless height and width of images are multiples of f."""
    if height % self.downscale or width % self.downscale:
      raise ValueError(f"image size {height}x{width} is not a multiple of {self.downscale}: resize or crop it")

  def encode_coarse(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the posterior, as encode, from the features of encode_fine."""
    moments = self.quant_conv(self.encoder(features, COARSE)).astype(jnp.float32)  # [b, h/f, w/f, 2c]
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)

  def decode(self, latents: jax.Array) -> jax.Array:
    """latents [b, h/f, w/f, c] -> images [b, h, w, 3] float32, not clipped."""
    return self.decode_with_features(latents)[0]

  def decode_with_features(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the output of decode, and the features [b, h, w, channels] that the last layer, conv_out, reads."""
    return self.decode_fine(self.decode_coarse(latents))

  def decode_coarse(self, latents: jax.Array) -> jax.Array:
    """latents [b, h/f, w/f, c] -> features [b, h/f, w/f, channels]."""
    return self.decoder(self.post_quant_conv(latents), COARSE)

  def decode_fine(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns images and features, as decode_with_features, from the features of decode_coarse."""
    images, features = self.decoder(features, FINE)
    return images.astype(jnp.float32), features

  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the reconstruction of images [b, h, w, 3] from the mean of the posterior."""
    mean, _ = self.encode(images)
    return self.decode(mean)


def sample_posterior(mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
  """Returns mean + std * eps, all [b, h, w, c]."""
  return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


def kl_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
  """Returns KL(N(mean, exp(logvar)) || N(0, I)) in nats, summed over each latent: [b, h, w, c] -> [b]."""
  return 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1.0 - logvar, axis=tuple(range(1, mean.ndim)))
