"""LayerNorm without learned parameters."""

import functools

import jax
import jax.numpy as jnp

EPS = 1e-5


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def layer_norm(x: jax.Array, eps: float = EPS) -> jax.Array:
  """Normalises the last axis without learned parameters, in float32; returns the dtype of x."""
  return normalise(x, eps)[0].astype(x.dtype)


def normalise(x: jax.Array, eps: float = EPS, axis: int = -1) -> tuple[jax.Array, jax.Array]:
  """Returns the normalised x, float32, and the factor 1 / sqrt(variance + eps), whose length along the axis is 1."""
  y = x.astype(jnp.float32)
  y = y - y.mean(axis, keepdims=True)
  factor = jax.lax.rsqrt(jnp.square(y).mean(axis, keepdims=True) + eps)
  return y * factor, factor


def normalise_gradient(y: jax.Array, factor: jax.Array, grad: jax.Array, axis: int = -1) -> jax.Array:
  """Returns the derivative of normalise along `grad`, float32, from its outputs; its matrix is symmetric.

  The two means do not wait for each other, as those of the derived derivative do.
  """
  return factor * (grad - grad.mean(axis, keepdims=True) - y * (y * grad).mean(axis, keepdims=True))


@layer_norm.defjvp
def _layer_norm_jvp(eps: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
  (x,), (dx,) = primals, tangents
  y, factor = normalise(x, eps)
  return y.astype(x.dtype), normalise_gradient(y, factor, dx.astype(jnp.float32)).astype(x.dtype)
