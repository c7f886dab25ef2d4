"""Attention as one TPU kernel: the logits of a head and their gradients stay in VMEM.

Sequences are short (MAX_LENGTH), so all keys fit at once: the softmax is the direct one, and the gradient recomputes
the weights from q and k. Arrays are transposed, positions last, [lk, lq]: this is the layout that XLA uses around
attention, and sums over keys run along sublanes.
"""

from collections.abc import Callable
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

MAX_LENGTH = 896  # queries or keys: the matrices of the gradient fit in 16 MB, the least VMEM of any TPU

_MASKED = -(2.0**120)  # added to a logit; exact in bfloat16
_INNER = (((1,), (0,)), ((), ()))  # x y
_FIRST = (((0,), (0,)), ((), ()))  # x^T y
_LAST = (((1,), (1,)), ((), ()))  # x y^T


@functools.partial(jax.jit, static_argnames="scale")
def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: jax.Array | None, key_bias: jax.Array | None
) -> jax.Array:
  """See attend of ops/attention.py; scale, mask and key_bias as there.

  Raises:
    ValueError: there are more than MAX_LENGTH queries or keys.
  """
  batch, queries, _, _ = q.shape
  keys = k.shape[1]
  if max(queries, keys) > MAX_LENGTH:
    raise ValueError(f"attention 'pallas' takes at most {MAX_LENGTH} positions, not {max(queries, keys)}: use 'xla'")
  bias = jnp.zeros((batch, keys), jnp.float32) if key_bias is None else jnp.broadcast_to(key_bias, (batch, keys))
  mask = None if mask is None else jnp.where(mask.T, 0.0, _MASKED).astype(jnp.bfloat16)
  q, k, v = (x.transpose(0, 2, 3, 1) for x in (q, k, v))
  return _attend(q, k, v, bias[:, :, None], mask, scale).transpose(0, 3, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, bias, mask, scale):
  """q [b, h, e, lq], k, v [b, h, e, lk], bias float32 [b, lk, 1], mask bfloat16 [lk, lq] or None -> [b, h, e, lq]."""
  return _per_device(functools.partial(_run, _forward_kernel, 1, scale), q, k, v, bias, mask)[0]


def _attend_fwd(q, k, v, bias, mask, scale):
  return _attend(q, k, v, bias, mask, scale), (q, k, v, bias, mask)


def _attend_bwd(scale, residuals, grad):
  return *_per_device(functools.partial(_run, _backward_kernel, 3, scale), *residuals, grad), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _run(kernel: Callable, outputs: int, scale: float, q, k, v, bias, mask, *grad) -> list[jax.Array]:
  """Runs a kernel over samples and heads; its outputs have the shapes of the first `outputs` of q, k, v."""
  (batch, heads, head_dim, queries), keys = q.shape, k.shape[-1]
  of_query = pl.BlockSpec((None, None, head_dim, queries), lambda i, j: (i, j, 0, 0))
  of_key = pl.BlockSpec((None, None, head_dim, keys), lambda i, j: (i, j, 0, 0))
  of_bias = pl.BlockSpec((None, keys, 1), lambda i, j: (i, 0, 0))
  of_mask = None if mask is None else pl.BlockSpec((keys, queries), lambda i, j: (0, 0))
  return pl.pallas_call(
    functools.partial(kernel, scale=scale),
    grid=(batch, heads),
    in_specs=[of_query, of_key, of_key, of_bias, of_mask] + [of_query] * len(grad),
    out_specs=[of_query, of_key, of_key][:outputs],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)[:outputs]],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    name="attention" if outputs == 1 else "attention_gradient",
  )(q, k, v, bias, mask, *grad)


_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _weights(q, k, bias_ref, mask_ref, scale: float) -> jax.Array:
  """Returns the softmax of a head, float32 [lk, lq]."""
  logits = _dot(k, q, _FIRST) * scale + bias_ref[...]
  if mask_ref is not None:
    logits = logits + mask_ref[...].astype(jnp.float32)
  weights = jnp.exp(logits - logits.max(0, keepdims=True))
  return weights * (1 / weights.sum(0, keepdims=True))


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, out_ref, *, scale):
  weights = _weights(q_ref[...], k_ref[...], bias_ref, mask_ref, scale)
  v = v_ref[...]
  out_ref[...] = _dot(v, weights.astype(v.dtype), _INNER).astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, grad_ref, dq_ref, dk_ref, dv_ref, *, scale):
  q, k, v, grad = q_ref[...], k_ref[...], v_ref[...], grad_ref[...]
  weights = _weights(q, k, bias_ref, mask_ref, scale)
  dv_ref[...] = _dot(grad, weights.astype(grad.dtype), _LAST).astype(dv_ref.dtype)
  dweights = _dot(v, grad, _FIRST)
  dlogits = weights * (dweights - (weights * dweights).sum(0, keepdims=True))
  dlogits = (dlogits * scale).astype(q.dtype)
  dq_ref[...] = _dot(k, dlogits, _INNER).astype(dq_ref.dtype)
  dk_ref[...] = _dot(q, dlogits, _LAST).astype(dk_ref.dtype)


def _per_device(run: Callable, q: jax.Array, *others: jax.Array | None) -> list[jax.Array]:
  """Runs the kernel on every device of the mesh, each on its part of the batch: XLA does not partition kernels.

  Only the mask, which has two axes, has no batch axis. If the batch is not divisible, every device computes all of it.
  """
  args = q, *others
  mesh = jax.typeof(q).sharding.mesh
  axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != jax.sharding.AxisType.Manual)
  parts = math.prod(mesh.shape[name] for name in axes)
  if parts == 1:
    return run(*args)
  rows = jax.P(axes if q.shape[0] % parts == 0 else None)
  specs = tuple(None if x is None else (rows if x.ndim > 2 else jax.P()) for x in args)
  return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, axis_names=set(axes), check_vma=False)(*args)
