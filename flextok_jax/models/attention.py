"""Multi-head attention: projections, norms of queries and keys, and caches, around ops/attention.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.ops import attention, layout, norms

QK_NORMS = ("none", "unscaled", *layers.NORMS)
KeysValues = tuple[jax.Array, jax.Array]


class QKV(nn.Module):
  """Queries, keys and values; their weights are one array [d, 3, h, e]."""

  head_dim: int
  use_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, queries: tuple[int, int] | None = None) -> list[jax.Array]:
    """Projects x [b, l, d].

    Args:
      x: [b, l, d].
      queries: (start, length) of the positions that need queries; None: all.

    Returns:
      q [b, length, h, e], k and v [b, l, h, e].
    """
    width = x.shape[-1]
    shape = (3, width // self.head_dim, self.head_dim)
    init = layers.xavier_uniform(width, ("embed", None, "heads", "head_dim"))
    kernel = self.param("kernel", init, (width, *shape)).astype(self.dtype)  # [d, 3, h, e]
    bias = jnp.zeros(shape, self.dtype)
    if self.use_bias:
      bias = self.param("bias", layers.zeros(None, "heads", "head_dim"), shape).astype(self.dtype)

    def project(x, which):
      # [b, l, d] -> [b, l, h, e]
      y = jnp.tensordot(x.astype(self.dtype), kernel[:, which], 1)
      y = layers.add_low_rank(self, x, y + bias[which] if self.use_bias else y, which)
      return layout.constrain(y, "batch", None, "heads", None)

    # Three products: TPUs would write their joint result, and its gradient, twice to divide it.
    asking = x if queries is None else x[:, queries[0] : sum(queries)]
    return [project(y, which) for which, y in enumerate((asking, x, x))]


class _Attention(nn.Module):
  """What self-attention and cross-attention share: norms of queries and keys, the scale, the output projection."""

  choices: layers.BlockChoices

  def _setup_shared(self) -> None:
    c = self.choices
    if c.qk_norm in layers.NORMS:
      self.q_norm = layers.norm(c.qk_norm, c.qk_norm_eps, c.dtype, axis=None)
      self.k_norm = layers.norm(c.qk_norm, c.qk_norm_eps, c.dtype, axis=None)
    self.out = layers.DenseGeneral(
      c.width,
      axis=(-2, -1),
      use_bias=c.out_bias,
      dtype=c.dtype,
      kernel_init=layers.xavier_uniform(c.width, ("heads", "head_dim", "embed")),
      bias_init=layers.zeros("embed"),
    )

  def _norm_q(self, q: jax.Array) -> jax.Array:
    """Normalises queries [b, l, h, e] per head."""
    if self.choices.qk_norm == "none":
      return q
    return norms.layer_norm(q) if self.choices.qk_norm == "unscaled" else self.q_norm(q)

  def _norm_k(self, k: jax.Array) -> jax.Array:
    """Normalises keys [b, l, h, e] per head."""
    if self.choices.qk_norm == "none":
      return k
    return norms.layer_norm(k) if self.choices.qk_norm == "unscaled" else self.k_norm(k)

  def _attend(self, q, k, v, mask=None, key_bias=None) -> jax.Array:
    """q [b, lq, h, e], k and v [b, lk, h, e], before their norms -> [b, lq, d]."""
    c = self.choices
    if c.qk_norm in layers.NORMS:  # "unscaled" is computed with the attention
      q, k = self._norm_q(q), self._norm_k(k)
    x = attention.attend(
      q,
      k,
      v,
      scale=c.logit_scale,
      mask=mask,
      key_bias=key_bias,
      layer_norm=c.qk_norm == "unscaled",
      implementation=c.attention,
    )
    return self.out(x)

  def _attend_cached(self, q: jax.Array, cache: KeysValues, key_bias: jax.Array) -> jax.Array:
    """As _attend for one query [b, 1, h, e] and a cache [b, h, n, e], in the layout of the cache -> [b, 1, d]."""
    keys, values = cache
    # [b, 1, h, e], [b, h, n, e] -> [b, h, 1, n]
    logits = jnp.einsum("bqhe,bhke->bhqk", q, keys, preferred_element_type=jnp.float32)
    logits = logits / (1 / self.choices.logit_scale)  # by sqrt(e): a product would round differently
    weights = nn.softmax(logits + key_bias[:, None, None])
    return self.out(jnp.einsum("bhqk,bhke->bqhe", weights.astype(q.dtype), values))


class SelfAttention(_Attention):
  """Self-attention over one sequence."""

  def setup(self) -> None:
    c = self.choices
    self.qkv = QKV(c.head_dim, c.qkv_bias, c.dtype)
    self._setup_shared()

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    queries: tuple[int, int] | None = None,
  ) -> tuple[jax.Array, KeysValues]:
    """Attends over all positions of x.

    Args:
      x: [b, l, d].
      mask: boolean [l, l] (query, key), True where a query may attend to a key.
      key_bias: float32 [b or 1, l], added to all logits of a key: attention.MASKED hides it, log(n) counts it n times.
      queries: (start, length) of the positions that attend; None: all.

    Returns:
      The output [b, length, d], and keys and values [b, l, h, e].

    Raises:
      ValueError: queries are not among the positions.
    """
    if queries is not None:
      start, length = queries
      if start < 0 or length < 1 or start + length > x.shape[1]:
        raise ValueError(f"queries (start, length) = {queries} are not among the {x.shape[1]} positions")
      mask = None if mask is None else mask[start : start + length]
    q, k, v = self.qkv(x, queries)
    return self._attend(q, k, v, mask, key_bias), (self._norm_k(k), v)

  def step(self, x: jax.Array, cache: KeysValues, position: jax.Array) -> tuple[jax.Array, KeysValues]:
    """As __call__ for x [b, 1, d] at `position`, after the positions before it in the cache [b, h, n, e]."""
    q, k, v = self.qkv(x)
    # [b, h, n, e], [b, 1, h, e] -> [b, h, n, e]
    write = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.swapaxes(1, 2).astype(old.dtype), position, 2)
    cache = write(cache[0], self._norm_k(k)), write(cache[1], v)
    visible = jnp.arange(cache[0].shape[2]) <= position
    key_bias = jnp.where(visible, jnp.float32(0), jnp.float32(attention.MASKED))[None]  # [1, n]
    return self._attend_cached(self._norm_q(q), cache, key_bias), cache


class CrossAttention(_Attention):
  """Attention from one sequence to another."""

  def setup(self) -> None:
    c = self.choices
    heads = c.width // c.head_dim
    dense = lambda shape, axes: layers.DenseGeneral(
      shape,
      use_bias=c.qkv_bias,
      dtype=c.dtype,
      kernel_init=layers.xavier_uniform(c.width, ("embed", *axes)),
      bias_init=layers.zeros(*axes),
    )
    self.q = dense((heads, c.head_dim), ("heads", "head_dim"))
    self.kv = dense((2, heads, c.head_dim), (None, "heads", "head_dim"))
    self._setup_shared()

  def keys_values(self, context: jax.Array) -> KeysValues:
    """context [b, t, d] -> keys and values [b, t, h, e]."""
    k, v = self._project(context)
    return self._norm_k(k), v

  def _project(self, context: jax.Array) -> KeysValues:
    """As keys_values, with keys before their norm."""
    kv = layout.constrain(self.kv(context), "batch", None, None, "heads", None)  # [b, t, 2, h, e]
    return kv[:, :, 0], kv[:, :, 1]

  def __call__(self, x: jax.Array, context: jax.Array, key_bias: jax.Array) -> jax.Array:
    """x [b, n, d], context [b, t, d], key_bias float32 [b, t] -> [b, n, d]."""
    q = layout.constrain(self.q(x), "batch", None, "heads", None)
    return self._attend(q, *self._project(context), key_bias=key_bias)

  def step(self, x: jax.Array, cache: KeysValues, key_bias: jax.Array) -> jax.Array:
    """As __call__ for x [b, 1, d] with the cached keys and values [b, h, t, e] of the context."""
    return self._attend_cached(self._norm_q(self.q(x)), cache, key_bias)
