"""Encoding and decoding of large pictures tile by tile, with the result of the whole picture.

What limits the size of a picture are the features that are larger than latents, up to 256 channels at the picture's own
size. Here they exist for one tile at a time. The part of the network at the size of latents, with its attention, sees
the whole picture.

A tile is computed in a window that is larger than the tile by the reach of the convolutions, so that its pixels do not
depend on where the window ends. What remains are the GroupNorms. Each needs the mean and the variance of the whole
picture, of features that depend on the GroupNorms before it. So all tiles are computed in several passes: each pass
normalises by the statistics that the pass before it has measured over all tiles, the first pass each window by its own.
After n passes the statistics of the first n norms are exact; the others converge sooner than that, and the last pass is
the one in which no statistic changes by more than TOLERANCE. All tiles of a pass are normalised alike: there are no
seams, and the distance to the result of the whole picture is about the tolerance.

Not differentiable in reverse mode, as the number of passes depends on the picture.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models.vae.autoencoder import NORM_EPSILON, AutoencoderKL

TOLERANCE = 1e-3  # change of a mean, and of a standard deviation, as a part of the standard deviation

Statistics = dict[tuple[str, ...], jax.Array]  # by the path of a norm: mean and variance, float32 [2, b, groups]


def encode(vae: AutoencoderKL, images: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
  """Returns vae.encode(images) of a bound vae, in windows of at most tile x tile pixels: see check for `tile`."""
  vae.check_size(*images.shape[1:3])
  network, variables = vae.unbind()
  fine: Callable[..., Any] = functools.partial(network.apply, variables, method="encode_fine")
  features = _map_tiles(fine, images, tile, vae.downscale, 1 / vae.downscale, encoder_reach(vae))
  return vae.encode_coarse(features)


def decode(vae: AutoencoderKL, latents: jax.Array, tile: int) -> jax.Array:
  """Returns vae.decode(latents) of a bound vae, in windows of at most tile x tile pixels: see check for `tile`."""
  network, variables = vae.unbind()
  both: Callable[..., Any] = functools.partial(network.apply, variables, method="decode_fine")
  features = vae.decode_coarse(latents)
  return _map_tiles(lambda x: both(x)[0], features, tile // vae.downscale, 1, vae.downscale, decoder_reach(vae))


def encoder_reach(vae: AutoencoderKL) -> int:
  """Returns how far, in latent pixels, the end of a window affects the features of vae.encode_fine."""
  pixels = 1  # conv_in
  for _ in vae.block_out_channels[1:]:
    pixels = (pixels + 2 * vae.layers_per_block) // 2 + 1  # at half the size
  return pixels


def decoder_reach(vae: AutoencoderKL) -> int:
  """Returns how far, in latent pixels, the end of a window affects the images of vae.decode_fine."""
  pixels = 0
  for _ in vae.block_out_channels[1:]:
    pixels = 2 * pixels + 1 + 2 * (vae.layers_per_block + 1)  # at twice the size
  return -(-(pixels + 1) // vae.downscale)  # with conv_out


def check(vae: AutoencoderKL, tile: int) -> None:
  """Raises ValueError unless pixels per side of a window, `tile`, leave a tile inside of the reach; 0: no tiles."""
  least = vae.downscale * (2 * max(encoder_reach(vae), decoder_reach(vae)) + 1)
  if tile and (tile < least or tile % vae.downscale):
    raise ValueError(
      f"vae.tile={tile} must be 0, for no tiles, or a multiple of {vae.downscale} of at least {least}, as convolutions "
      "need overlap"
    )


@dataclasses.dataclass(frozen=True)
class _Axis:
  """Windows and tiles along one side of a picture, in units of a latent pixel. All have the same size.

  Attributes:
    window: length of a window.
    tile: length of a tile.
    windows: where each window starts.
    tiles: where its tile starts. The last tile may overlap the one before it.
    counted: 1.0 at the positions of each window that no other window counts, [n, window].
  """

  window: int
  tile: int
  windows: np.ndarray
  tiles: np.ndarray
  counted: np.ndarray

  @classmethod
  def divide(cls, length: int, window: int, reach: int) -> "_Axis":
    """Divides a side: windows lie inside of it, and extend tiles by `reach` except where the side ends."""
    window = min(window, length)
    tile = length if window == length else window - 2 * reach
    first = np.arange(0, length, tile)
    tiles = np.minimum(first, length - tile)
    windows = np.clip(tiles - reach, 0, length - window)
    position = windows[:, None] + np.arange(window)
    return cls(window, tile, windows, tiles, ((first[:, None] <= position) & (position < first[:, None] + tile)) * 1.0)


def _map_tiles(
  fine: Callable[[jax.Array], jax.Array], x: jax.Array, window: int, unit: int, scale: float, reach: int
) -> jax.Array:
  """Returns fine(x), computed in windows.

  Args:
    fine: features [b, h, w, c] to features [b, scale * h, scale * w, c'].
    x: [b, h, w, c].
    window: largest side of a window, in pixels of x.
    unit: pixels of x in a latent pixel.
    scale: see fine.
    reach: of the convolutions in fine, in latent pixels.
  """
  batch, out_unit = x.shape[0], round(unit * scale)
  rows, columns = (_Axis.divide(side // unit, window // unit, reach) for side in x.shape[1:3])
  area = float(rows.counted.sum() * columns.counted.sum())  # latent pixels

  def compute(i: Any, j: Any, statistics: Statistics | None, first: Any) -> tuple[jax.Array, Statistics]:
    """Returns fine of window (i, j), and what its norms add to mean and mean square of x - mean by `statistics`."""
    start = (0, jnp.asarray(rows.windows)[i] * unit, jnp.asarray(columns.windows)[j] * unit, 0)
    part = jax.lax.dynamic_slice(x, start, (batch, rows.window * unit, columns.window * unit, x.shape[3]))
    counted = jnp.asarray(rows.counted, jnp.float32)[i], jnp.asarray(columns.counted, jnp.float32)[j]
    return _with_statistics(fine, part, counted, area, statistics, first)

  y, added = jax.eval_shape(lambda: compute(0, 0, None, True))

  def add(k: jax.Array, carry: tuple[jax.Array, Statistics], statistics: Statistics, first: jax.Array) -> Any:
    out, sums = carry
    i, j = k // len(columns.tiles), k % len(columns.tiles)
    y, more = compute(i, j, statistics, first)
    tile = jnp.asarray(rows.tiles)[i] * out_unit, jnp.asarray(columns.tiles)[j] * out_unit
    start = jnp.asarray(rows.windows)[i] * out_unit, jnp.asarray(columns.windows)[j] * out_unit
    inside = (0, tile[0] - start[0], tile[1] - start[1], 0)
    y = jax.lax.dynamic_slice(y, inside, (batch, rows.tile * out_unit, columns.tile * out_unit, y.shape[3]))
    return jax.lax.dynamic_update_slice(out, y, (0, *tile, 0)), jax.tree.map(jnp.add, sums, more)

  def all_tiles(carry: tuple[jax.Array, Statistics, jax.Array, jax.Array]) -> Any:
    out, statistics, changing, count = carry
    step = functools.partial(add, statistics=statistics, first=count == 0)
    out, sums = jax.lax.fori_loop(0, len(rows.tiles) * len(columns.tiles), step, (out, zeros))
    measured = {path: _measured(statistics[path], sums[path]) for path in sums}
    change = [_change(statistics[path], measured[path]) for path in sums]
    changing &= jnp.stack([jnp.zeros(batch), *change]).max(0) > TOLERANCE
    # The statistics of a picture stay what its last pass used, whatever others in the batch need.
    keep = lambda old, new: jnp.where(changing[:, None], new, old)
    return out, jax.tree.map(keep, statistics, measured), changing, count + 1

  zeros = {path: jnp.zeros(s.shape, s.dtype) for path, s in added.items()}
  out = jnp.zeros((batch, *(side // unit * out_unit for side in x.shape[1:3]), y.shape[3]), y.dtype)
  more = lambda carry: carry[2].any() & (carry[3] <= len(zeros))
  return jax.lax.while_loop(more, all_tiles, (out, zeros, jnp.ones(batch, bool), jnp.int32(0)))[0]


def _with_statistics(
  fine: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  counted: tuple[jax.Array, jax.Array],
  area: float,
  statistics: Statistics | None,
  first: Any,
) -> tuple[jax.Array, Statistics]:
  """Returns fine(x), whose norms use given statistics, and what x adds to the statistics of the whole picture.

  Args:
    fine: a function of flax modules.
    x: a window.
    counted: weights of its rows and of its columns, in latent pixels.
    area: of the picture, in latent pixels.
    statistics: mean and variance of each norm; None: zeros.
    first: whether the norms use the statistics of x itself instead.

  Returns:
    fine(x), and for each norm the sums of x - mean and of its square, divided by the number of values in the picture.
  """
  added: Statistics = {}

  def call(function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    norm = context.module
    if not isinstance(norm, nn.GroupNorm):
      return function(*args, **kwargs)
    x = args[0].astype(jnp.float32)
    batch, height, width, channels = x.shape
    groups = cast(int, norm.num_groups)
    x = x.reshape(batch, height, width, groups, -1)
    mean, variance = jnp.zeros((2, batch, groups)) if statistics is None else statistics[norm.path]
    every = lambda s: s[:, None, None, :, None]
    weights = [jnp.repeat(w, side // w.size) for w, side in zip(counted, (height, width))]
    repeats = height * width * channels // (counted[0].size * counted[1].size * groups)  # per latent pixel
    away = (x - every(mean)) * weights[0][:, None, None, None] * weights[1][:, None, None]
    sums = jnp.stack([away.sum((1, 2, 4)), jnp.square(away).sum((1, 2, 4))]) / repeats
    added[norm.path] = sums / area
    own = sums / (counted[0].sum() * counted[1].sum())
    mean, variance = jnp.where(first, _measured(jnp.stack([mean, variance]), own), jnp.stack([mean, variance]))
    x = (x - every(mean)) * jax.lax.rsqrt(every(variance) + norm.epsilon)
    params = norm.variables["params"]
    return x.reshape(args[0].shape) * params["scale"] + params["bias"]

  with nn.intercept_methods(call):
    return fine(x), added


def _measured(statistics: jax.Array, away: jax.Array) -> jax.Array:
  """Returns mean and variance, given the mean of x - statistics[0] and of its square, each [2, b, groups]."""
  return jnp.stack([statistics[0] + away[0], jnp.maximum(away[1] - away[0] ** 2, 0)])


def _change(old: jax.Array, new: jax.Array) -> jax.Array:
  """Returns the largest change of statistics [2, b, groups] of each picture [b], in standard deviations."""
  before, after = jnp.sqrt(old[1] + NORM_EPSILON), jnp.sqrt(new[1] + NORM_EPSILON)
  return jnp.max(jnp.stack([jnp.abs(new[0] - old[0]), jnp.abs(after - before)]) / after, (0, 2))
