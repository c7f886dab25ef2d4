"""Attention as one TPU kernel: the logits of a head and their gradients stay in VMEM.

Sequences are short (MAX_LENGTH), so all keys fit at once: the softmax is the direct one, and the gradient recomputes
the weights from q and k. Arrays are transposed, positions last, [lk, lq]: this is the layout that XLA uses around
attention, and sums over keys run along sublanes. A step of the grid has several heads, as one alone takes no longer
than to start its copies to VMEM.
"""

from collections.abc import Callable
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

FORWARD, BACKWARD = "attention", "attention_gradient"  # names of the kernels
MAX_LENGTH = 896  # queries or keys: the matrices of the gradient fit in VMEM
VMEM = 15e6  # bytes; XLA gives a kernel 16 MB on TPUs with the least
MAX_HEADS = 8  # of a step

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
  return _per_device(functools.partial(run_kernel, FORWARD, scale), q, k, v, bias, mask)[0]


def _attend_fwd(q, k, v, bias, mask, scale):
  return _attend(q, k, v, bias, mask, scale), (q, k, v, bias, mask)


def _attend_bwd(scale, residuals, grad):
  return *_per_device(functools.partial(run_kernel, BACKWARD, scale), *residuals, grad), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def run_kernel(name: str, scale: float, q, k, v, bias, mask, *grad) -> list[jax.Array]:
  """Runs FORWARD or BACKWARD over samples and heads.

  Args:
    name: of the kernel.
    scale: of the products of queries and keys.
    q, k, v, bias, mask: see _attend.
    grad: of the output, for BACKWARD.

  Returns:
    The output [b, h, e, lq], or the gradients of q, k and v.
  """
  kernel, outputs = {FORWARD: (_forward_kernel, 1), BACKWARD: (_backward_kernel, 3)}[name]
  (batch, heads, head_dim, queries), keys = q.shape, k.shape[-1]
  count = _heads_of_step(heads, head_dim, max(queries, keys), q.dtype.itemsize)
  of_query = pl.BlockSpec((None, count, head_dim, queries), lambda i, j: (i, j, 0, 0))
  of_key = pl.BlockSpec((None, count, head_dim, keys), lambda i, j: (i, j, 0, 0))
  of_bias = pl.BlockSpec((None, keys, 1), lambda i, j: (i, 0, 0))
  of_mask = None if mask is None else pl.BlockSpec((keys, queries), lambda i, j: (0, 0))
  return pl.pallas_call(
    functools.partial(kernel, scale=scale),
    grid=(batch, heads // count),
    in_specs=[of_query, of_key, of_key, of_bias, of_mask] + [of_query] * len(grad),
    out_specs=[of_query, of_key, of_key][:outputs],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)[:outputs]],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    name=name,
  )(q, k, v, bias, mask, *grad)


def _heads_of_step(heads: int, head_dim: int, length: int, itemsize: int) -> int:
  """Returns how many heads a step of the grid computes: the most that divide `heads` and fit."""
  one = 2 * 7 * head_dim * length * itemsize  # blocks of the gradient, for this step and the next
  most = min(MAX_HEADS, int((VMEM - 4 * 4 * length**2) / one))  # beside four float32 matrices
  return max(count for count in range(1, heads + 1) if heads % count == 0 and count <= max(1, most))


_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _weights(q, k, bias_ref, mask_ref, scale: float) -> tuple[jax.Array, jax.Array]:
  """Returns the softmax of a head as exponentials, float32 [lk, lq], and a factor [1, lq]."""
  logits = _dot(k, q, _FIRST) * scale + bias_ref[...]
  if mask_ref is not None:
    logits = logits + mask_ref[...].astype(jnp.float32)
  exponentials = jnp.exp(logits - logits.max(0, keepdims=True))
  return exponentials, 1 / exponentials.sum(0, keepdims=True)


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, out_ref, *, scale):
  for head in range(q_ref.shape[0]):
    exponentials, factor = _weights(q_ref[head], k_ref[head], bias_ref, mask_ref, scale)
    v = v_ref[head]
    out_ref[head] = (_dot(v, exponentials.astype(v.dtype), _INNER) * factor).astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, grad_ref, dq_ref, dk_ref, dv_ref, *, scale):
  for head in range(q_ref.shape[0]):
    q, k, v, grad = q_ref[head], k_ref[head], v_ref[head], grad_ref[head]
    exponentials, factor = _weights(q, k, bias_ref, mask_ref, scale)
    grad = (grad * factor).astype(grad.dtype)  # of the product of v and the exponentials
    dv_ref[head] = _dot(grad, exponentials.astype(grad.dtype), _LAST).astype(dv_ref.dtype)
    dweights = _dot(v, grad, _FIRST)
    dlogits = exponentials * (dweights - (exponentials * dweights).sum(0, keepdims=True) * factor)
    dlogits = (dlogits * scale).astype(q.dtype)
    dq_ref[head] = _dot(k, dlogits, _INNER).astype(dq_ref.dtype)
    dk_ref[head] = _dot(q, dlogits, _LAST).astype(dk_ref.dtype)


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
