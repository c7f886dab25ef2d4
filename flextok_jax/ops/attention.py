"""Softmax attention: one function with several implementations."""

import jax
import jax.numpy as jnp

from flextok_jax.ops import norms

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")
MASKED = float(jnp.finfo(jnp.float32).min) / 2  # key bias of a hidden key: its weight is exactly 0

_CUDNN_FEATURES = 128  # largest head: the limit of Ampere (later GPUs take 256)
_PALLAS_FEATURES = 128
PALLAS_LENGTH = 896  # queries or keys: the matrices of the gradient fit in VMEM
_BIAS_FEATURES = 3  # bfloat16 numbers whose sum has the 24 bits of a float32


def choose_implementation(
  implementation: str,
  head_dim: int,
  dtype: jnp.dtype,
  device: jax.Device | None = None,
  masked: bool = False,
  length: int = 1,
) -> str:
  """Returns the name of the implementation that runs: "xla", "cudnn" or "pallas".

  "auto" is "cudnn" if it can run and there is no mask (cuDNN takes a mask as a bias and may refuse to compute its
  gradient), "pallas" on TPUs if it can run and dtype is bfloat16, else "xla". On TPUs XLA writes the float32 logits of
  a forward pass to HBM and reads them back, 8 bytes per logit: from 64 keys on, for heads of 64, that is more than q,
  k, v and the output. "pallas" keeps them in VMEM, and computes the norms of queries and keys in the same kernel;
  docs/scaling.md compares the two by the compiler's cycles. It has been compiled for TPUs but has only run in the
  interpreter of Pallas: launch/accelerator_check.sh compares it with "xla" on a TPU.

  Args:
    implementation: one of IMPLEMENTATIONS.
    head_dim: features per head.
    dtype: of queries, keys and values.
    device: that runs the attention; None: the default device.
    masked: whether there is a mask [lq, lk].
    length: number of queries or keys, whichever is larger.

  Raises:
    ValueError: when the implementation is unknown or cannot run there.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"unknown attention {implementation!r}: one of {', '.join(IMPLEMENTATIONS)}")
  device = _default_device() if device is None else device
  if implementation == "auto":
    if not masked and not _obstacle("cudnn", head_dim, dtype, device, length):
      return "cudnn"
    fits = jnp.dtype(dtype) == jnp.bfloat16 and not _obstacle("pallas", head_dim, dtype, device, length)
    return "pallas" if fits else "xla"
  obstacle = _obstacle(implementation, head_dim, dtype, device, length)
  if obstacle:
    raise ValueError(f"attention {implementation!r} {obstacle}: use 'auto'")
  return implementation


def _default_device() -> jax.Device:
  device = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, a platform or None
  return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def _obstacle(name: str, head_dim: int, dtype: jnp.dtype, device: jax.Device, length: int) -> str:
  """Returns why the implementation cannot run on the device, or ""."""
  dtype = jnp.dtype(dtype)
  if name == "cudnn":
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; "gfx90a" on AMD's
    if device.platform != "gpu" or not capability[:1].isdigit() or float(capability) < 8:
      return f"needs an NVIDIA GPU of compute capability 8.0 or later, not {device.platform} {capability}".rstrip()
    if dtype not in (jnp.bfloat16, jnp.float16):
      return f"computes in bfloat16 or float16, not {dtype}"
    if head_dim + _BIAS_FEATURES > _CUDNN_FEATURES:
      return f"takes heads of at most {_CUDNN_FEATURES - _BIAS_FEATURES} features, not {head_dim}"
  if name == "pallas":
    if device.platform != "tpu":
      return f"needs a TPU, not {device.platform}"
    if dtype not in (jnp.bfloat16, jnp.float32):
      return f"computes in bfloat16 or float32, not {dtype}"
    if head_dim > _PALLAS_FEATURES:
      return f"takes heads of at most {_PALLAS_FEATURES} features, not {head_dim}"
    if length > PALLAS_LENGTH:
      return f"takes at most {PALLAS_LENGTH} queries or keys, not {length}"
  return ""


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float,
  mask: jax.Array | None = None,
  key_bias: jax.Array | None = None,
  layer_norm: bool = False,
  implementation: str = "auto",
) -> jax.Array:
  """softmax(scale q k^T + key_bias) v for each head, with the softmax in float32.

  Args:
    q: queries [b, lq, h, e].
    k: keys [b, lk, h, e].
    v: values [b, lk, h, e].
    scale: of the products of queries and keys.
    mask: boolean [lq, lk], True where a query may attend to a key; each query needs at least one key.
    key_bias: float32 [b or 1, lk], added to all logits of a key: MASKED hides it, log(n) counts it n times. It gets no
      gradient.
    layer_norm: whether queries and keys are normalised first (norms.layer_norm).
    implementation: see choose_implementation.

  Returns:
    [b, lq, h, e] of q's dtype.

  Raises:
    ValueError: as choose_implementation; the shape of mask or key_bias does not match q and k.
  """
  batch, queries, _, head_dim = q.shape
  keys = k.shape[1]
  if mask is not None and mask.shape != (queries, keys):
    raise ValueError(f"the mask must be [{queries}, {keys}] (query, key), got {list(mask.shape)}")
  if key_bias is not None:
    if key_bias.shape not in ((batch, keys), (1, keys)):
      raise ValueError(f"the key bias must be [{batch}, {keys}] or [1, {keys}], got {list(key_bias.shape)}")
    key_bias = jax.lax.stop_gradient(key_bias.astype(jnp.float32))
  length = max(queries, keys)
  name = choose_implementation(implementation, head_dim, q.dtype, masked=mask is not None, length=length)
  if name == "pallas":
    from flextok_jax.ops import attention_pallas  # importing Pallas takes a second

    return attention_pallas.attend(q, k, v, scale, mask, key_bias, layer_norm)
  if layer_norm:
    with jax.named_scope("head_norms"):
      q, k = norms.layer_norm(q), norms.layer_norm(k)
  return (_cudnn if name == "cudnn" else _xla)(q, k, v, scale, mask, key_bias)


def _xla(q, k, v, scale, mask, key_bias):
  bias = None if key_bias is None else key_bias[:, None, None]  # [b or 1, 1, 1, lk]
  if mask is not None:
    # On TPUs XLA fuses the softmax with the product of q and k only if the bias may differ between samples, which the
    # barrier makes it assume: with the mask alone, logits would pass through HBM twice as often.
    key_bias = jnp.zeros((1, k.shape[1]), jnp.float32) if key_bias is None else key_bias
    key_bias = jax.lax.optimization_barrier(jnp.broadcast_to(key_bias, k.shape[:2]))
    bias = key_bias[:, None, None] + jnp.where(mask, jnp.float32(0), jnp.float32(MASKED))
  return jax.nn.dot_product_attention(q, k, v, bias=bias, scale=scale, implementation="xla")


def _cudnn(q, k, v, scale, mask, key_bias):
  """Runs the flash attention of cuDNN, which has no key bias.

  It has a bias [1 or b, 1 or h, lq, lk] of the dtype of q, but in bfloat16 log(255) is 0.3 % off, which is 1.6 % of the
  weight, and it would spend time on the gradient of that bias. So the key bias is added by additional features
  (bias_features); the mask, whose 0 and -large are exact, is a bias. Gradients need even lengths, and a number of
  features divisible by 8.
  """
  queries, keys, head_dim = q.shape[1], k.shape[1], q.shape[-1]
  if mask is not None:
    mask = jnp.pad(mask, ((0, queries % 2), (0, 0)), constant_values=True)
    mask = jnp.pad(mask, ((0, 0), (0, keys % 2)))[None, None]
  if keys % 2 and mask is None and key_bias is None:
    key_bias = jnp.zeros((1, keys), jnp.float32)
  q, k, v = _pad(q, 1, queries % 2), _pad(k, 1, keys % 2), _pad(v, 1, keys % 2)
  if key_bias is not None:
    key_bias = jnp.pad(key_bias, ((0, 0), (0, keys % 2)), constant_values=MASKED)
    q, k = bias_features(q, k, key_bias / scale)
  features = -(-q.shape[-1] // 8) * 8
  q, k, v = (_pad(x, 3, features - x.shape[-1]) for x in (q, k, v))
  out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
  return out[:, :queries, :, :head_dim]


def padding_bias(lengths: jax.Array, size: int) -> jax.Array:
  """lengths int [b] -> key_bias of attend, float32 [b, size]: 0 before the length, MASKED from there on."""
  return jnp.where(jnp.arange(size, dtype=jnp.int32) < lengths[:, None], jnp.float32(0), jnp.float32(MASKED))


def bias_features(q: jax.Array, k: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Appends features to q [b, lq, h, e] and k [b, lk, h, e] that add bias [b or 1, lk] to their products.

  A float32 is the sum of three bfloat16 numbers: each is a feature of k and is multiplied by a 1 in q. Products are
  accumulated in float32, so the bias is exact, except that it is clipped at -2^40 (float16: -2^15).
  """
  bias = jnp.maximum(bias, -(2.0**15) if q.dtype == jnp.float16 else -(2.0**40))
  parts = []
  for _ in range(_BIAS_FEATURES):
    parts.append(jax.lax.reduce_precision(bias, exponent_bits=8, mantissa_bits=7))  # XLA may drop a pair of casts
    bias = bias - parts[-1]
  features = jnp.stack(parts, -1).astype(k.dtype)[:, :, None]  # [b or 1, lk, 1, 3]
  ones = jnp.ones((*q.shape[:-1], _BIAS_FEATURES), q.dtype)
  features = jnp.broadcast_to(features, (*k.shape[:-1], _BIAS_FEATURES))
  return jnp.concatenate([q, ones], -1), jnp.concatenate([k, features], -1)


def _pad(x: jax.Array, axis: int, count: int) -> jax.Array:
  """Appends `count` zeros along an axis."""
  return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)]) if count else x
