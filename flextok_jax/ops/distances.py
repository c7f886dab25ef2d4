"""Distances between images, to find the shortest prefix that suffices (inference/adaptive.py) and for the VAE's loss.

All take two batches [b, h, w, 3] of float32 in [-1, 1] and return float32 [b]. They are symmetric, and 0 for equal
images. They use elementwise float32 arithmetic only (no matrix products), so accelerators do not lower their precision.
"""

from collections.abc import Callable
import math

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

Distance = Callable[[jax.Array, jax.Array], jax.Array]

# The binomial of standard deviation 1 px and its first and second derivative, exact for lines and parabolas.
_SMOOTH = tuple(w / 16 for w in (1, 4, 6, 4, 1))
_SLOPE = tuple(w / 8 for w in (-1, -2, 0, 2, 1))
_CURVE = tuple(w / 4 for w in (1, 0, -2, 0, 1))
DETAIL_WINDOW = 16  # pixels
MIN_SIDE = 8  # pixels; the pyramid has no smaller scale, unless the image itself is smaller
COLOR_FLOOR = 1.0  # the constant beside the colours: they count about linearly
STRUCTURE_FLOOR = 0.2  # beside the filters: contrast well above it counts by its pattern, well below it by its strength


def mse(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the mean squared error over pixels and channels; 4 times that of images in [0, 1]."""
  return jnp.mean(jnp.square(a - b), axis=(1, 2, 3))


def perceptual(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns a distance of the form of LPIPS over fixed filters; it is not LPIPS, and not comparable with it.

  As in LPIPS (Zhang et al. 2018), with weights of 1: features at several scales, normalised to unit length over
  channels at every pixel; the squared difference, summed over channels, averaged over space, summed over scales. The
  features are not learned: at every scale of a pyramid of 2x2 averages, down to MIN_SIDE pixels, they are the smoothed
  luminance and two opponent colours and, normalised separately, the first and second derivatives of the smoothed
  colours, which span those of all directions (Freeman and Adelson 1991). A constant channel in each of the two groups
  acts like the biases of a network: without it, white would be normalised to grey, and faint grain to texture.

  Each scale adds at most 4 + 4. Images may have any size; at 32 px there are 3 scales, at 256 px 6.
  """
  a, b = _opponent(a), _opponent(b)
  total = _scale_distance(a, b)
  while min(a.shape[1:3]) >= 2 * MIN_SIDE:
    a, b = _halve(a), _halve(b)
    total += _scale_distance(a, b)
  return total


def statistics(images: jax.Array) -> jax.Array:
  """Returns features of images by the fixed filters of `perceptual`, for Fréchet distances between sets of images.

  Args:
    images: [b, h, w, 3] in [-1, 1].

  Returns:
    Mean and standard deviation over space of the 18 channels before their normalisation, at each scale of the pyramid:
    [b, 36 * scales].
  """
  x, found = _opponent(images), []
  while True:
    channels = jnp.concatenate(_channels(x), -1)  # [b, h, w, 18]
    found += [channels.mean((1, 2)), channels.std((1, 2))]
    if min(x.shape[1:3]) < 2 * MIN_SIDE:
      return jnp.concatenate(found, -1)
    x = _halve(x)


def detail(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns how much the local detail of images differs: 0 if it is as strong everywhere, whatever its pattern.

  The detail at a place is the mean absolute difference of pixels that are neighbours in a row or in a column, over a
  window of DETAIL_WINDOW x DETAIL_WINDOW; the distance is the mean absolute difference of the two details over windows
  (every half a window), channels and the two directions.
  """
  apart = lambda x, axis: jnp.abs(jnp.diff(x.astype(jnp.float32), axis=axis))
  rows, columns = (
    jnp.abs(_window_means(apart(a, axis)) - _window_means(apart(b, axis))).mean((1, 2, 3)) for axis in (1, 2)
  )
  return (rows + columns) / 2


DISTANCES = {"mse": mse, "perceptual": perceptual}


def resolve(metric: str | Distance) -> Distance:
  """Returns the distance of a name in DISTANCES, or the given function.

  Raises:
    ValueError: metric is neither.
  """
  if callable(metric):
    return metric
  if not isinstance(metric, str) or metric not in DISTANCES:
    raise ValueError(f"unknown metric {metric!r}: one of {', '.join(DISTANCES)}, or a function of two image batches")
  return DISTANCES[metric]


def _opponent(images: jax.Array) -> jax.Array:
  """RGB in [-1, 1] -> luminance, red against green, blue against yellow, each in [-1, 1]."""
  red, green, blue = (images[..., i].astype(jnp.float32) for i in range(3))
  return jnp.stack([(red + green + blue) / 3, (red - green) / 2, (2 * blue - red - green) / 4], -1)


def _halve(x: jax.Array) -> jax.Array:
  """Averages 2x2 pixels: [b, h, w, c] -> [b, h // 2, w // 2, c]; an odd last row or column is dropped."""
  height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  return einops.reduce(x[:, :height, :width], "b (h i) (w j) c -> b h w c", "mean", i=2, j=2)


def _window_means(x: jax.Array) -> jax.Array:
  """Averages over windows that overlap by half: [b, h, w, c] -> [b, h', w', c]; smaller images are one window."""
  height, width = (min(DETAIL_WINDOW, side) for side in x.shape[1:3])
  return nn.avg_pool(x, (height, width), (max(height // 2, 1), max(width // 2, 1)))


def _scale_distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the distance at one scale: squared differences of unit features, [b, h, w, 3] twice -> [b]."""
  pairs = zip(_features(a), _features(b))
  distances = (jnp.mean(jnp.sum(jnp.square(x - y), axis=-1), axis=(1, 2)) for x, y in pairs)
  return sum(distances, start=jnp.zeros((), jnp.float32))


def _features(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x [b, h, w, 3] -> unit vectors of colour [b, h, w, 3 + 1] and of structure [b, h, w, 15 + 1]."""
  color, structure = _channels(x)
  return _unit(color, COLOR_FLOOR), _unit(structure, STRUCTURE_FLOOR)


def _channels(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x [b, h, w, 3] -> smoothed colours [b, h, w, 3] and their derivatives [b, h, w, 15]."""
  smooth, slope, curve = (_filter(x, taps, 2) for taps in (_SMOOTH, _SLOPE, _CURVE))
  structure = [
    _filter(slope, _SMOOTH, 1),
    _filter(smooth, _SLOPE, 1),
    _filter(curve, _SMOOTH, 1),
    math.sqrt(2) * _filter(slope, _SLOPE, 1),  # twice in the Hessian: no direction counts more
    _filter(smooth, _CURVE, 1),
  ]
  return _filter(smooth, _SMOOTH, 1), jnp.concatenate(structure, -1)


def _filter(x: jax.Array, taps: tuple[float, ...], axis: int) -> jax.Array:
  """Correlates x [b, h, w, c] with the taps along an axis; the border is replicated."""
  reach = len(taps) // 2
  padded = jnp.pad(x, [(reach, reach) if i == axis else (0, 0) for i in range(4)], mode="edge")
  views = (jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(len(taps)))
  return sum((w * view for w, view in zip(taps, views) if w), start=jnp.zeros((), jnp.float32))


def _unit(x: jax.Array, constant: float) -> jax.Array:
  """Appends a constant channel and divides by the length over channels."""
  x = jnp.concatenate([x, jnp.full((*x.shape[:-1], 1), constant)], -1)
  return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
