"""Token counts, the noise of each image and the sampler's settings, for those who decode with a stage's functions."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax

from flextok_jax.inference import validation
from flextok_jax.models.tokenizer.flextok import Sampler
from flextok_jax.ops import nested


def token_counts(requested: Sequence[int], num_registers: int) -> tuple[int, ...]:
  """Returns the token counts to report, ascending; () means the powers of two up to num_registers, and itself.

  Raises:
    ValueError: a count outside 1..num_registers.
  """
  if not requested:
    return nested.powers_of_two(num_registers)
  for count in requested:
    if not 1 <= count <= num_registers:
      raise ValueError(f"num_tokens={count} is out of range: this model takes 1 to {num_registers} tokens")
  return tuple(sorted(set(requested)))


def decoder_by_image(detokenize: Callable, seed: int) -> Callable:
  """Makes a decoder in which the noise of image i is drawn by fold_in(key(seed), i).

  So an image's noise does not depend on its neighbours, the batch size or the number of tokens.

  Args:
    detokenize: of a stage's predict_fns.
    seed: of the noise.

  Returns:
    (params, ids [b, slots], keep_k [b], index [b], size) -> images [b, h, w, 3]; index is the number of each image,
    size is (h, w), by default that of training.

  Raises:
    ValueError: a seed that does not fit 32 bits.
  """
  validation.seed(seed)

  def decode(
    params: Any, ids: jax.Array, keep_k: jax.Array, index: jax.Array, size: tuple[int, int] | None = None
  ) -> jax.Array:
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)
    return detokenize(params, ids, keep_k, keys) if size is None else detokenize(params, ids, keep_k, keys, size)

  return decode


def override_sampler(settings: Mapping[str, Any], **given: Any) -> dict[str, Any]:
  """Returns sampler settings, such as config.sampler, with those that are given, and are not None, in place of its own.

  Args:
    **given: num_steps, guidance, guidance_scale, guidance_interval.

  Raises:
    ValueError: a setting out of range, or a scale where guidance is off.
  """
  return dataclasses.asdict(validation.sampler(Sampler(**settings), **given))
