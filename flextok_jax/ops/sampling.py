"""Choosing the next token: guidance, temperature, top-k and top-p of logits [..., num_ids]."""

import jax
import jax.numpy as jnp


def guide(conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array) -> jax.Array:
  """Classifier-free guidance of logits: u + scale (c - u); scale 1 is the conditional model."""
  return unconditional + scale * (conditional - unconditional)


def filter_logits(
  logits: jax.Array, temperature: float | jax.Array = 1.0, top_k: int = 0, top_p: float | jax.Array | None = None
) -> jax.Array:
  """Applies temperature, then top-k, then top-p.

  Args:
    logits: [..., v].
    temperature: above 0; divides the logits.
    top_k: keeps the k largest logits and all that equal the k-th; 0 keeps all.
    top_p: of the remaining tokens, drops the least likely ones whose probabilities sum to at most 1 - top_p, but never
      the most likely token (nucleus sampling, Holtzman et al. 2020); None keeps all.

  Returns:
    float32 [..., v], -inf for excluded tokens.
  """
  logits = logits.astype(jnp.float32) / temperature
  if 0 < top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None:
    ascending = jnp.sort(logits, -1)
    mass = jnp.cumsum(jax.nn.softmax(ascending, -1), -1)  # ascending, so that small ones are not lost to rounding
    kept = (mass > 1 - top_p).at[..., -1].set(True)
    least = jnp.min(jnp.where(kept, ascending, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def candidates(keys: jax.Array | None, scores: jax.Array, count: int, replacement: bool = False) -> jax.Array:
  """Returns int32 [b, count]: the ids with the largest scores [b, v], or with keys [b] draws from softmax(scores).

  Draws without replacement add Gumbel noise to the scores, so the most probable orders come first (Kool et al. 2019).
  """
  if keys is not None and replacement:
    draw = lambda key, row: jax.random.categorical(key, row, shape=(count,))
    return jax.vmap(draw)(keys, scores).astype(jnp.int32)
  if keys is not None:
    scores = scores + jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
  return jax.lax.top_k(scores, count)[1].astype(jnp.int32)


def sample(keys: jax.Array, logits: jax.Array) -> jax.Array:
  """Draws int32 [b] from softmax(logits [b, v]); row i depends only on keys[i]."""
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
