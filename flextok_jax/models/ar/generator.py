"""The generator: a GPT over token ids, conditioned on a class or on a text (SPEC of the blocks: flextok_jax/config.py)."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models import layers
from flextok_jax.models.attention import QKV
from flextok_jax.models.transformer import MLP, rematerialised
from flextok_jax.ops import attention, layout

NORMS = {"layernorm": 1e-5, "rmsnorm": 1e-6}  # and their epsilon
FFNS = ("swiglu", "mlp_gelu")
POS_EMBEDS = ("absolute", "sincos1d")
CONDITIONS = ("class", "text", "none")
Cache = tuple[jax.Array, jax.Array]  # keys and values [b, h, n, e]


def _norm(kind: str, eps: float, dtype: jnp.dtype, axis: str | None = "embed", name: str | None = None) -> nn.Module:
  """Returns a norm of the last axis, its statistics in float32."""
  ones = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
  eps = eps or NORMS[kind]
  if kind == "rmsnorm":
    return nn.RMSNorm(eps, dtype=dtype, scale_init=ones, use_fast_variance=False, name=name)
  zeros = layers.zeros(axis)
  return nn.LayerNorm(eps, dtype=dtype, scale_init=ones, bias_init=zeros, use_fast_variance=False, name=name)


@dataclasses.dataclass(frozen=True)
class BlockChoices:
  """What all blocks have in common; flextok_jax/config.py explains the fields."""

  width: int
  head_dim: int
  hidden: int
  gated: bool
  norm: str
  norm_eps: float
  qk_norm: str
  qk_norm_eps: float
  bias: bool
  text: bool
  dtype: jnp.dtype
  attention: str


class _Attention(nn.Module):
  """What self-attention and cross-attention share: norms of queries and keys, the scale, the output projection."""

  choices: BlockChoices

  def _setup(self):
    c = self.choices
    if c.qk_norm != "none":
      self.q_norm = _norm(c.qk_norm, c.qk_norm_eps, c.dtype, None)
      self.k_norm = _norm(c.qk_norm, c.qk_norm_eps, c.dtype, None)
    self.out = nn.DenseGeneral(
      c.width,
      axis=(-2, -1),
      use_bias=c.bias,
      dtype=c.dtype,
      kernel_init=layers.xavier_uniform(c.width, ("heads", "head_dim", "embed")),
      bias_init=layers.zeros("embed"),
    )

  def _norm_q(self, q: jax.Array) -> jax.Array:
    return q if self.choices.qk_norm == "none" else self.q_norm(q)

  def _norm_k(self, k: jax.Array) -> jax.Array:
    return k if self.choices.qk_norm == "none" else self.k_norm(k)

  def _attend(self, q, k, v, mask=None, key_bias=None) -> jax.Array:
    """q, k, v [b, l, h, e] -> [b, lq, d]."""
    c = self.choices
    scale = 1 / math.sqrt(c.head_dim)
    return self.out(attention.attend(q, k, v, scale=scale, mask=mask, key_bias=key_bias, implementation=c.attention))

  def _look_up(self, q: jax.Array, cache: Cache, key_bias: jax.Array) -> jax.Array:
    """The same for a single query [b, 1, h, e] and a cache, in the order in which the cache lies in memory."""
    keys, values = cache
    logits = jnp.einsum("bqhe,bhke->bhqk", q, keys, preferred_element_type=jnp.float32)
    weights = nn.softmax(logits / math.sqrt(self.choices.head_dim) + key_bias[:, None, None])
    return self.out(jnp.einsum("bhqk,bhke->bqhe", weights.astype(q.dtype), values))


class SelfAttention(_Attention):
  """Causal attention."""

  def setup(self):
    c = self.choices
    self.qkv = QKV(c.head_dim, c.bias, c.dtype)
    self._setup()

  def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """x [b, n, d] -> what attention adds [b, n, d], and keys and values [b, n, h, e]."""
    q, k, v = self.qkv(x)
    q, k = self._norm_q(q), self._norm_k(k)
    return self._attend(q, k, v, mask=jnp.tri(x.shape[1], dtype=bool)), (k, v)

  def step(self, x: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
    """The same for x [b, 1, d] at `position`, after what the cache holds before it."""
    q, k, v = self.qkv(x)
    new = (self._norm_k(k), v)
    cache = tuple(
      jax.lax.dynamic_update_slice(old, x.swapaxes(1, 2).astype(old.dtype), (0, 0, position, 0))
      for old, x in zip(cache, new)
    )
    seen = jnp.arange(cache[0].shape[2]) <= position
    return self._look_up(self._norm_q(q), cache, jnp.where(seen, 0.0, attention.UNSEEN)[None]), cache


class CrossAttention(_Attention):
  """Attention to the text, whose padding is hidden by key_bias [b, t]."""

  def setup(self):
    c = self.choices
    heads = c.width // c.head_dim
    dense = lambda shape, axes: nn.DenseGeneral(
      shape,
      use_bias=c.bias,
      dtype=c.dtype,
      kernel_init=layers.xavier_uniform(c.width, ("embed", *axes)),
      bias_init=layers.zeros(*axes),
    )
    self.q = dense((heads, c.head_dim), ("heads", "head_dim"))
    self.kv = dense((2, heads, c.head_dim), (None, "heads", "head_dim"))
    self._setup()

  def look_at(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """text [b, t, d] -> keys and values [b, t, h, e]."""
    kv = layout.constrain(self.kv(text), "batch", None, None, "heads", None)
    return self._norm_k(kv[:, :, 0]), kv[:, :, 1]

  def __call__(self, x: jax.Array, text: jax.Array, key_bias: jax.Array) -> jax.Array:
    """x [b, n, d], text [b, t, d] -> [b, n, d]."""
    q = layout.constrain(self.q(x), "batch", None, "heads", None)
    return self._attend(self._norm_q(q), *self.look_at(text), key_bias=key_bias)

  def step(self, x: jax.Array, cache: Cache, key_bias: jax.Array) -> jax.Array:
    """The same for x [b, 1, d] with the cached keys and values of the text."""
    return self._look_up(self._norm_q(self.q(x)), cache, key_bias)


class Block(nn.Module):
  """Pre-norm: causal self-attention, cross-attention to the text where there is one, MLP."""

  choices: BlockChoices

  def setup(self):
    c = self.choices
    norm = lambda: _norm(c.norm, c.norm_eps, c.dtype)
    self.norm_1, self.norm_2 = norm(), norm()
    self.attention = SelfAttention(c)
    if c.text:
      self.cross = CrossAttention(c)
      self.norm_3 = norm()
    self.mlp = MLP(c.hidden, c.gated, "silu" if c.gated else "gelu", c.bias, c.dtype)

  def _add_mlp(self, x: jax.Array) -> jax.Array:
    norm = self.norm_3 if self.choices.text else self.norm_2
    return x + self.mlp(norm(x))

  def __call__(self, x: jax.Array, text: jax.Array | None, key_bias: jax.Array | None) -> tuple[jax.Array, None]:
    """x [b, n, d], text [b, t, d] and key_bias [b, t] or None -> x; the None is for the scan."""
    return self.fill(x, text, key_bias)[0], None

  def fill(self, x, text, key_bias) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The same, with the keys and values [b, n, h, e] of x."""
    x = layout.constrain(x, "batch", None, None)
    y, kv = self.attention(self.norm_1(x))
    x = x + y
    if self.choices.text:
      x = x + self.cross(self.norm_2(x), text, key_bias)
    return self._add_mlp(x), kv

  def look_at(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [b, t, h, e] of the text."""
    return self.cross.look_at(text)

  def step(self, x, cache: Cache, text: Cache | None, key_bias, position) -> tuple[jax.Array, Cache]:
    """x [b, 1, d] at `position` -> x and the longer cache."""
    x = layout.constrain(x, "batch", None, None)
    y, cache = self.attention.step(self.norm_1(x), cache, position)
    x = x + y
    if self.choices.text:
      x = x + self.cross.step(self.norm_2(x), text, key_bias)
    return self._add_mlp(x), cache


def sincos_table(length: int, width: int) -> np.ndarray:
  """Returns the fixed table of positions [length, width] of the reference, float64.

  Position 0 is zero and position i is i - 1 of a 2D sin-cos table whose other axis is always 0: its first half is
  [0 ..., 1 ...].
  """
  frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
  angles = np.arange(length - 1)[:, None] * frequencies
  still = np.zeros_like(angles)
  table = np.concatenate([np.sin(still), np.cos(still), np.sin(angles), np.cos(angles)], -1)
  return np.concatenate([np.zeros((1, width)), table])


class ARTransformer(nn.Module):
  """Embedding, blocks, final norm and readout."""

  choices: BlockChoices
  depth: int
  num_ids: int  # that are read
  num_outputs: int  # that are predicted: one more with a stop id
  num_tokens: int
  num_classes: int  # 0: none
  pos_embed: str
  head_layernorm: bool
  readout_multiplier: float
  remat: str = "none"  # a key of transformer.REMATS

  def setup(self):
    c = self.choices
    init = lambda *axes: layers.normal(0.02, *axes)
    self.embedding = self.param("embedding", init("vocab", "embed"), (self.num_ids, c.width))
    self.start = self.param("start", init("embed"), (c.width,))
    if self.pos_embed == "absolute":
      self.positions = self.param("positions", init(None, "embed"), (self.num_tokens, c.width))
    else:
      self.positions = jnp.asarray(sincos_table(self.num_tokens, c.width), jnp.float32)
    if self.num_classes:
      self.class_embedding = self.param("class_embedding", init("classes", "embed"), (self.num_classes, c.width))
    stack = nn.scan(
      rematerialised(Block, self.remat),
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=self.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    self.blocks = stack(c)
    self.norm = _norm(c.norm, c.norm_eps, c.dtype)
    if self.head_layernorm:
      self.head_norm = _norm("layernorm", 0.0, c.dtype)
    shape, axes = (c.width, self.num_outputs), ("embed", "vocab")
    self.readout = _Readout(shape, axes, c.bias)

  def start_vector(self, labels: jax.Array) -> jax.Array:
    """labels int [b], -1 for none -> the input of position 0 without its position, [b, d] float32."""
    start = jnp.broadcast_to(self.start, (len(labels), self.choices.width))
    if not self.num_classes:
      return start
    return start + jnp.where((labels >= 0)[:, None], self.class_embedding[jnp.maximum(labels, 0)], 0)

  def place(self, x: jax.Array, position: jax.Array) -> jax.Array:
    """Adds the position's vector: x [b, n, d] float32, of positions [n] -> the blocks' input."""
    return (x + self.positions[position]).astype(self.choices.dtype)

  def embed(self, ids: jax.Array) -> jax.Array:
    return self.embedding[ids]

  def inputs(self, ids: jax.Array, labels: jax.Array) -> jax.Array:
    """ids int [b, n] -> the blocks' input [b, n, d]: the start vector and all ids but the last."""
    x = jnp.concatenate([self.start_vector(labels)[:, None], self.embed(ids[:, :-1])], 1)
    return self.place(x, jnp.arange(ids.shape[1]))

  def finish(self, x: jax.Array) -> jax.Array:
    """What the last block gives -> what the readout reads."""
    x = self.norm(layout.constrain(x, "batch", *(None,) * (x.ndim - 1)))
    return self.head_norm(x) if self.head_layernorm else x

  def hidden(self, ids, labels, text=None, key_bias=None) -> jax.Array:
    """What the readout reads [b, n, d], for each of ids [b, n] from those before it.

    Args:
      ids: int [b, n].
      labels: int [b], -1 for none; without meaning for models without classes.
      text: [b, t, d] projected, or None.
      key_bias: float32 [b, t], UNSEEN at padding, or None.
    """
    x, _ = self.blocks(self.inputs(ids, labels), text, key_bias)
    return self.finish(x)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """hidden [..., d] -> float32 [..., num_outputs]."""
    return self.readout(self.readout_multiplier * hidden)

  def __call__(self, ids, labels, text=None, key_bias=None) -> jax.Array:
    """Teacher forcing: see hidden; logits float32 [b, n, num_outputs]."""
    return self.logits(self.hidden(ids, labels, text, key_bias))

  def losses(self, hidden: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """Cross-entropy float32 [b, n] of targets int [b, n], in nats.

    Logits exist for at most `chunk` positions at once, forward and backward: [b, chunk, num_outputs] instead of
    [b, n, num_outputs].
    """
    batch, length = targets.shape
    chunk = max(size for size in range(1, min(chunk, length) + 1) if length % size == 0)
    by_chunk = lambda x: x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
    read = self.readout.reader(hidden.dtype)

    @jax.checkpoint
    def losses(part):
      x, target = part
      logits = read(self.readout_multiplier * x)
      # logsumexp minus the target's logit: no second array of the logits' size.
      chosen = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
      return jax.nn.logsumexp(logits, -1) - chosen

    return jax.lax.map(losses, (by_chunk(hidden), by_chunk(targets))).swapaxes(0, 1).reshape(batch, length)


class _Readout(nn.Module):
  """A linear layer with float32 outputs."""

  shape: tuple[int, int]
  axes: tuple[str, str]
  use_bias: bool

  def setup(self):
    self.kernel = self.param("kernel", layers.normal(0.02, *self.axes), self.shape)
    if self.use_bias:
      self.bias = self.param("bias", layers.zeros(self.axes[1]), self.shape[1:])

  def reader(self, dtype: jnp.dtype):
    """Returns x [..., d] of dtype -> float32 [..., outputs], a function without linen in it."""
    bias = self.bias if self.use_bias else 0.0
    kernel = layout.gather(self.kernel.astype(dtype), None, self.axes[1])  # once for all calls

    def read(x):
      y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32) + bias
      return layout.constrain(y, "batch", *(None,) * (y.ndim - 2), "vocab")

    return read

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.reader(x.dtype)(x)


class TextMLP(nn.Module):
  """Text features -> the generator's width: two linear layers without bias, tanh-GELU between them."""

  hidden: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = layers.dense(self.hidden, (None, "mlp"), "in", self.dtype, use_bias=False)(x)
    return layers.dense(self.width, ("mlp", "embed"), "out", self.dtype, use_bias=False)(nn.gelu(x, approximate=True))


class Generator(nn.Module):
  """The generator with what turns text into its condition.

  `text` is trained jointly and called as text(text_ids, text_lengths); None where features come from elsewhere.
  """

  ar: ARTransformer
  text_mlp: TextMLP | None = None
  text: nn.Module | None = None

  def project(self, features: jax.Array | None, lengths: jax.Array | None) -> tuple:
    """Text features [b, t, f] and lengths [b] -> (text [b, t, d], key_bias [b, t]), or two None."""
    if self.text_mlp is None:
      return None, None
    features = features.astype(self.ar.choices.dtype)
    return self.text_mlp(features), attention.padding_bias(lengths, features.shape[1])

  def encode_text(self, text_ids: jax.Array, text_lengths: jax.Array) -> jax.Array:
    """text_ids int [b, t], text_lengths [b] -> features [b, t, f]."""
    return self.text(text_ids, text_lengths)

  def hidden(self, ids, labels, features=None, text_lengths=None) -> jax.Array:
    """See ARTransformer; features [b, t, f] as of encode_text."""
    return self.ar.hidden(ids, labels, *self.project(features, text_lengths))

  def __call__(self, ids, labels, features=None, text_lengths=None) -> jax.Array:
    """Teacher forcing: logits float32 [b, n, num_outputs] of ids [b, n]."""
    return self.ar.logits(self.hidden(ids, labels, features, text_lengths))

  def losses(self, ids, labels, targets, chunk, features=None, text_lengths=None) -> jax.Array:
    """Cross-entropy [b, n] of targets, see ARTransformer."""
    return self.ar.losses(self.hidden(ids, labels, features, text_lengths), targets, chunk)
