"""Adaptive length: for each image the shortest prefix of its tokens that decodes well enough.

A simple picture is told in a few tokens, a full one takes more (arXiv 2502.13967 suggests to use that). The length is
found by decoding prefixes and comparing them with the image, a bisection over lengths for a whole batch at once.
"""

from collections.abc import Callable
import math
import numbers

import jax
import jax.numpy as jnp

from flextok_jax.core.images import to_float
from flextok_jax.ops import distances, nested

Decode = Callable[[jax.Array, jax.Array], jax.Array]


def shortest_prefix(
  decode: Decode, distance: distances.Distance, images: jax.Array, ids: jax.Array, threshold: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Finds for each image the shortest prefix of its ids whose reconstruction is within a threshold; jit it.

  A bisection that takes the distance to fall with the length, and then finds the shortest such prefix of all. Where the
  distance does not fall (a decoder is no monotone function), the prefix is still one whose own distance was measured to
  be within the threshold, though a shorter one may be, too. It is all n ids where none that was tried is within it;
  whether n are, the distance tells. A distance that is NaN is not.

  All rounds are one program that decodes the whole batch at n slots, ceil(log2 n) times, and once more at most, where
  some image takes all n. Fewer slots in rounds whose lengths are small would need a compilation of the decoder for each
  size, and such rounds are rare: the first tries n / 2, the second n / 4 and 3 n / 4, so that from there on a batch of
  mixed images has one that needs nearly all slots.

  Args:
    decode: (ids [b, n], keep_k int32 [b]) -> images [b, h, w, 3] in [-1, 1], from the first keep_k ids of each. It
      should start from the same noise at every length, or the lengths will be those of lucky noise.
    distance: of two image batches (see ops/distances.py).
    images: what is to be reconstructed, uint8 or float in [-1, 1] [b, h, w, 3].
    ids: int [b, n].
    threshold: largest distance that will do, one number or one an image.

  Returns:
    (lengths int32 [b], 1 to n; the distance of each prefix, float32 [b]).

  Raises:
    ValueError: distance does not return one number an image, or decode images of another size.
  """
  return _bisect(decode, distance, images, ids, threshold, measure_all=True)


def shortest_length(
  decode: Decode, distance: distances.Distance, images: jax.Array, ids: jax.Array, threshold: float | jax.Array
) -> jax.Array:
  """Returns the lengths of shortest_prefix alone: its last round, which does not change them, is left out."""
  return _bisect(decode, distance, images, ids, threshold, measure_all=False)[0]


def _bisect(decode, distance, images, ids, threshold, measure_all: bool):
  images = to_float(images)
  batch, most = ids.shape
  _check_shape(distance, images)

  # The shortest prefix has low to high ids. That of high ids is within the threshold, or it is all ids.
  def unfinished(state):
    low, high, _, measured = state
    return ((low < high) | (~measured & measure_all)).any()

  def one_round(state):
    low, high, gap, measured = state
    length = (low + high) // 2
    restored = decode(ids, length)
    if restored.shape != images.shape:
      raise ValueError(
        f"the tokens decode to images {list(restored.shape)}, which cannot be compared with images {list(images.shape)}"
      )
    tried = distance(images, restored).astype(jnp.float32)
    searching = low < high
    within = searching & (tried <= threshold)
    accept = within | (~searching & ~measured)  # a search that ended at all ids has not measured them
    low = jnp.where(searching & ~within, length + 1, low)
    return low, jnp.where(within, length, high), jnp.where(accept, tried, gap), measured | accept

  start = jnp.ones(batch, jnp.int32), jnp.full(batch, most, jnp.int32), jnp.zeros(batch), jnp.zeros(batch, bool)
  _, lengths, gap, _ = jax.lax.while_loop(unfinished, one_round, start)
  return lengths, gap


def _check_shape(distance, images: jax.Array):
  """Raises ValueError for a distance that does not return one number an image."""
  result = jax.eval_shape(distance, images, images)
  shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
  if shape != images.shape[:1] or not jnp.issubdtype(dtype, jnp.floating):
    got = type(result).__name__ if shape is None else f"{dtype} {list(shape)}"
    raise ValueError(f"a metric must return one floating-point number an image, [{len(images)}] here; got {got}")


def check_quality(quality: float):
  """Raises ValueError for a threshold that is no finite number above 0."""
  if isinstance(quality, bool) or not isinstance(quality, numbers.Real) or not 0 < quality < math.inf:
    raise ValueError(f"quality={quality!r} must be a finite number above 0, the largest distance that will do")


def pad_to_slots(ids: jax.Array, num_registers: int) -> jax.Array:
  """Pads ids [b, n] with zeros, which have no influence, to the slots in which all lengths up to n decode."""
  return jnp.pad(ids, ((0, 0), (0, nested.padded_length(ids.shape[1], num_registers) - ids.shape[1])))


def shared_noise(seed: int, shape: tuple[int, ...]) -> jax.Array:
  """Returns starting latents [h, w, c] for all images: those of image 0 in a call with key(seed)."""
  return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), shape)
