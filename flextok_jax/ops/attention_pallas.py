"""Attention as one TPU kernel: the logits of a head and their gradients stay in VMEM.

Sequences are short (attention.PALLAS_LENGTH), so all keys fit at once: the softmax is the direct one, and the gradient
recomputes the weights from q and k. Arrays are transposed, positions last, [lk, lq]: this is the layout that XLA uses
around attention, and sums over keys run along sublanes. A step of the grid computes several heads, since the copies of
one alone to VMEM take longer to start than its computation.
"""

from collections.abc import Callable
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from flextok_jax.ops import layout, norms

FORWARD, BACKWARD = "attention", "attention_gradient"  # names of the kernels
NORMALISED = "normalised_"  # before the name of one with the norms of queries and keys
VMEM = 15e6  # bytes; XLA gives a kernel 16 MB on TPUs with the least
MAX_HEADS = 8  # of a step

_MASKED = -(2.0**120)  # added to a logit; exact in bfloat16
_INNER = (((1,), (0,)), ((), ()))  # x y
_FIRST = (((0,), (0,)), ((), ()))  # x^T y
_LAST = (((1,), (1,)), ((), ()))  # x y^T


@functools.partial(jax.jit, static_argnames=("scale", "layer_norm"))
def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  scale: float,
  mask: jax.Array | None,
  key_bias: jax.Array | None,
  layer_norm: bool,
) -> jax.Array:
  """See attend of ops/attention.py; scale, mask, key_bias and layer_norm as there."""
  batch, keys = k.shape[:2]
  bias = jnp.zeros((batch, keys), jnp.float32) if key_bias is None else jnp.broadcast_to(key_bias, (batch, keys))
  mask = None if mask is None else jnp.where(mask.T, 0.0, _MASKED).astype(jnp.bfloat16)
  q, k, v = (x.transpose(0, 2, 3, 1) for x in (q, k, v))
  return _attend(q, k, v, bias[:, :, None], mask, scale, layer_norm).transpose(0, 3, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, bias, mask, scale, layer_norm):
  """q [b, h, e, lq], k, v [b, h, e, lk], bias float32 [b, lk, 1], mask bfloat16 [lk, lq] or None -> [b, h, e, lq]."""
  return _per_device(functools.partial(run_kernel, FORWARD, scale, layer_norm), q, k, v, bias, mask)[0]


def _attend_fwd(q, k, v, bias, mask, scale, layer_norm):
  return _attend(q, k, v, bias, mask, scale, layer_norm), (q, k, v, bias, mask)


def _attend_bwd(scale, layer_norm, residuals, grad):
  run = functools.partial(run_kernel, BACKWARD, scale, layer_norm)
  return *_per_device(run, *residuals, grad), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def run_kernel(name: str, scale: float, layer_norm: bool, q, k, v, bias, mask, *grad) -> list[jax.Array]:
  """Runs FORWARD or BACKWARD over samples and heads.

  Args:
    name: of the kernel.
    scale, layer_norm: see attend.
    q, k, v, bias, mask: see _attend.
    grad: of the output, for BACKWARD.

  Returns:
    The output [b, h, e, lq], or the gradients of q, k and v.
  """
  outputs = 1 if name == FORWARD else 3
  kernel: Callable = _forward_kernel if name == FORWARD else _backward_kernel
  (batch, heads, head_dim, queries), keys = q.shape, k.shape[-1]
  count = _heads_of_step(heads, head_dim, max(queries, keys), q.dtype.itemsize)
  of_query = pl.BlockSpec((None, count, head_dim, queries), lambda i, j: (i, j, 0, 0))
  of_key = pl.BlockSpec((None, count, head_dim, keys), lambda i, j: (i, j, 0, 0))
  of_bias = pl.BlockSpec((None, keys, 1), lambda i, j: (i, 0, 0))
  of_mask = None if mask is None else pl.BlockSpec((keys, queries), lambda i, j: (0, 0))
  return pl.pallas_call(
    functools.partial(kernel, scale=scale, layer_norm=layer_norm),
    grid=(batch, heads // count),
    in_specs=[of_query, of_key, of_key, of_bias, of_mask] + [of_query] * len(grad),
    out_specs=[of_query, of_key, of_key][:outputs],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)[:outputs]],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    name=f"{NORMALISED}{name}" if layer_norm else name,
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


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, out_ref, *, scale, layer_norm):
  for head in range(q_ref.shape[0]):
    q, k, v = q_ref[head], k_ref[head], v_ref[head]
    if layer_norm:
      q, k = (norms.normalise(x, axis=0)[0].astype(x.dtype) for x in (q, k))
    exponentials, factor = _weights(q, k, bias_ref, mask_ref, scale)
    out_ref[head] = (_dot(v, exponentials.astype(v.dtype), _INNER) * factor).astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, grad_ref, dq_ref, dk_ref, dv_ref, *, scale, layer_norm):
  for head in range(q_ref.shape[0]):
    q, k, v, grad = q_ref[head], k_ref[head], v_ref[head], grad_ref[head]
    if layer_norm:
      normalised = norms.normalise(q, axis=0), norms.normalise(k, axis=0)
      q, k = (x.astype(q.dtype) for x, _ in normalised)
    exponentials, factor = _weights(q, k, bias_ref, mask_ref, scale)
    grad = (grad * factor).astype(grad.dtype)  # of the product of v and the exponentials
    dv_ref[head] = _dot(grad, exponentials.astype(grad.dtype), _LAST).astype(dv_ref.dtype)
    dweights = _dot(v, grad, _FIRST)
    dlogits = exponentials * (dweights - (exponentials * dweights).sum(0, keepdims=True) * factor)
    dlogits = (dlogits * scale).astype(q.dtype)
    gradients = _dot(k, dlogits, _INNER), _dot(q, dlogits, _LAST)
    if layer_norm:
      gradients = (norms.normalise_gradient(*x, dx, axis=0) for x, dx in zip(normalised, gradients))
    for ref, x in zip((dq_ref, dk_ref), gradients):
      ref[head] = x.astype(ref.dtype)


def _per_device(run: Callable, q: jax.Array, *others: jax.Array | None) -> list[jax.Array]:
  """Runs the kernel on every device of the mesh, each on its part of batch and heads: XLA does not partition kernels.

  Where "tensor" divides the heads, they are divided along it; the batch, padded, along all other axes. The mask, which
  has two axes, is whole on every device.
  """
  args = q, *others
  mesh = jax.typeof(q).sharding.mesh
  sizes = {n: mesh.shape[n] for n, k in zip(mesh.axis_names, mesh.axis_types) if k != jax.sharding.AxisType.Manual}
  if math.prod(sizes.values()) == 1:
    return run(*args)
  (heads,) = layout.split(("heads",), (q.shape[1],), sizes)
  rows = tuple(name for name in sizes if name not in heads)
  missing = -len(q) % math.prod(sizes[name] for name in rows)
  pad = lambda x: x if x is None or x.ndim == 2 else jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
  specs = {2: jax.P(), 3: jax.P(rows), 4: jax.P(rows, heads)}
  in_specs = tuple(None if x is None else specs[x.ndim] for x in args)
  divided = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=specs[4], axis_names=set(sizes), check_vma=False)
  return [x[: len(q)] for x in divided(*map(pad, args))]
