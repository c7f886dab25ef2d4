"""Adaptive length: for each image the shortest prefix of its tokens that decodes well enough.

A simple image needs few tokens, a complex one needs more (arXiv 2502.13967 suggests using that). The length is found by
decoding prefixes and comparing them with the image, in a bisection over lengths for a whole batch at once.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core.images import to_float
from flextok_jax.ops import distances, nested

Decode = Callable[[jax.Array, jax.Array], jax.Array]
State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # low, high, gap, measured [b]


def shortest_prefix(
  decode: Decode, distance: distances.Distance, images: jax.Array, ids: jax.Array, threshold: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Finds for each image the shortest prefix of its ids whose reconstruction is within a threshold; jit it.

  The bisection assumes that the distance decreases with the length; then the result is the shortest such prefix. If it
  does not decrease (decoders are not monotone), the measured distance of the result is still within the threshold, but
  a shorter prefix may be within it, too. If no prefix that was tried is within the threshold, the result is all n ids,
  and their distance shows whether they are. NaN is never within the threshold.

  All rounds are one program that decodes the whole batch with n slots, ceil(log2 n) times, plus once if an image takes
  all n. Fewer slots in rounds with short lengths would need one compilation of the decoder per size, and such rounds
  are rare: the first tries n / 2, the second n / 4 and 3 n / 4, so from then on a batch of mixed images has one that
  needs nearly all slots.

  Args:
    decode: (ids [b, n], keep_k int32 [b]) -> images [b, h, w, 3] in [-1, 1], from the first keep_k ids of each. It
      should start from the same noise at every length, otherwise lengths depend on lucky noise.
    distance: of two image batches (see ops/distances.py).
    images: the originals, uint8 or float in [-1, 1] [b, h, w, 3].
    ids: int [b, n].
    threshold: largest acceptable distance, one number or one per image.

  Returns:
    (lengths int32 [b], 1 to n; the distance of each prefix, float32 [b]).

  Raises:
    ValueError: distance does not return one number per image, or decode returns images of another size.
  """
  return _bisect(decode, distance, images, ids, threshold, measure_all=True)


def shortest_length(
  decode: Decode, distance: distances.Distance, images: jax.Array, ids: jax.Array, threshold: float | jax.Array
) -> jax.Array:
  """Returns only the lengths of shortest_prefix, without its last round, which does not change them."""
  return _bisect(decode, distance, images, ids, threshold, measure_all=False)[0]


def _bisect(
  decode: Decode,
  distance: distances.Distance,
  images: jax.Array,
  ids: jax.Array,
  threshold: float | jax.Array,
  measure_all: bool,
) -> tuple[jax.Array, jax.Array]:
  images = to_float(images)
  batch, most = ids.shape
  _check_shape(distance, images)

  # The shortest prefix has low to high ids. That of high ids is within the threshold, or it is all ids.
  def unfinished(state: State) -> jax.Array:
    low, high, _, measured = state
    return ((low < high) | (~measured & measure_all)).any()

  def one_round(state: State) -> State:
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

  start = (
    jnp.ones(batch, jnp.int32),
    jnp.full(batch, most, jnp.int32),
    jnp.zeros(batch, jnp.float32),
    jnp.zeros(batch, bool),
  )
  _, lengths, gap, _ = jax.lax.while_loop(unfinished, one_round, start)
  return lengths, gap


def _check_shape(distance: distances.Distance, images: jax.Array) -> None:
  """Raises ValueError for a distance that does not return one number per image."""
  result = jax.eval_shape(distance, images, images)
  shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
  if dtype is None or shape != images.shape[:1] or not jnp.issubdtype(dtype, jnp.floating):
    got = type(result).__name__ if shape is None else f"{dtype} {list(shape)}"
    raise ValueError(f"a metric must return one floating-point number per image, [{len(images)}] here; got {got}")


def pad_to_slots(ids: jax.Array, num_registers: int) -> jax.Array:
  """Pads ids [b, n] with zeros, which have no effect, to the number of slots that all lengths up to n need."""
  return jnp.pad(ids, ((0, 0), (0, nested.padded_length(ids.shape[1], num_registers) - ids.shape[1])))


def shared_noise(seed: int, shape: tuple[int, ...]) -> jax.Array:
  """Returns starting latents [h, w, c] for all images: those of image 0 in a call with key(seed)."""
  return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), shape, jnp.float32)


def pad_sequences(sequences: Sequence[np.ndarray], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns sequences as ids int32 [n, num_tokens], 0 past their ends, and their lengths int [n]."""
  ids = np.zeros((len(sequences), num_tokens), np.int32)
  for row, sequence in zip(ids, sequences):
    row[: len(sequence)] = sequence
  return ids, np.array([len(sequence) for sequence in sequences])
