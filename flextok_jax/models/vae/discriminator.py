"""The PatchGAN discriminator of pix2pix (Isola et al. 2017), as used by VQGAN and latent diffusion models."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.vae.autoencoder import conv
from flextok_jax.ops import layout

_KERNEL, _SLOPE = 4, 0.2  # of every convolution; of the leaky ReLU


def patches_of(size: int, num_layers: int) -> int:
  """Returns the logits per side of PatchDiscriminator for images of size x size pixels; below 1: too small."""
  return size // 2**num_layers - 2


class PatchDiscriminator(nn.Module):
  """Images [b, h, w, 3] in [-1, 1] to logits float32 [b, h', w'], one per patch (of 70 x 70 px with 3 layers).

  NLayerDiscriminator of taming-transformers: 4x4 convolutions with padding 1, `num_layers` of stride 2 and then two of
  stride 1; leaky ReLU of slope 0.2; BatchNorm after all convolutions except the first and last. Kernels are initialised
  from N(0, 0.02), scales from N(1, 0.02), biases with 0.

  Attributes:
    channels: of the first layer; each of the next layers, at most three, doubles them.
    num_layers: convolutions of stride 2.
    dtype: compute type of the convolutions; parameters, statistics and logits are float32.
  """

  channels: int = 64
  num_layers: int = 3
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    def layer(x, channels, stride, index, use_bias):
      init = nn.initializers.normal(0.02)
      x = conv(
        channels,
        _KERNEL,
        self.dtype,
        stride=stride,
        padding=1,
        use_bias=use_bias,
        kernel_init=init,
        name=f"conv_{index}",
      )(x)
      return layout.constrain(x, "batch", None, None, None)

    x = nn.leaky_relu(layer(images, self.channels, 2, 0, use_bias=True), _SLOPE)
    for i in range(1, self.num_layers + 1):
      x = layer(x, self.channels * min(2**i, 8), 2 if i < self.num_layers else 1, i, use_bias=False)
      x = nn.leaky_relu(BatchNorm(name=f"norm_{i}")(x), _SLOPE)
    return layer(x, 1, 1, self.num_layers + 1, use_bias=True)[..., 0].astype(jnp.float32)


class BatchNorm(nn.Module):
  """Normalises each channel of x [b, h, w, c] by its mean and variance over this batch, in float32.

  There are no running averages, as the discriminator is used in training only. The batch is that of all devices.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    draw = lambda key, shape: 1 + 0.02 * jax.random.normal(key, shape, jnp.float32)
    scale: Any = self.param("scale", nn.with_logical_partitioning(draw, ("conv_out",)), x.shape[-1:])
    bias: Any = self.param("bias", layers.zeros("conv_out"), x.shape[-1:])
    x = x.astype(jnp.float32)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias
