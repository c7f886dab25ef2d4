"""The generator: a GPT over token ids, conditioned on a class or a text; flextok_jax/config explains its options."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models import layers
from flextok_jax.models.attention import CrossAttention, KeysValues, SelfAttention
from flextok_jax.ops import attention, layout

FFNS = ("swiglu", "mlp_gelu")


class CausalBlock(nn.Module):
  """Pre-norm: causal self-attention, cross-attention to a text if the choices say so, MLP."""

  choices: layers.BlockChoices

  def setup(self) -> None:
    c = self.choices
    norm = lambda: layers.norm(c.norm, c.norm_eps, c.dtype)
    self.norm_1, self.norm_2 = norm(), norm()
    self.attention = SelfAttention(c)
    if c.cross_attention:
      self.cross = CrossAttention(c)
      self.norm_3 = norm()
    self.mlp = layers.MLP(c)

  def _add_mlp(self, x: jax.Array) -> jax.Array:
    norm = self.norm_3 if self.choices.cross_attention else self.norm_2
    return x + self.mlp(norm(x))

  def __call__(self, x: jax.Array, text: jax.Array | None, key_bias: jax.Array | None) -> jax.Array:
    """x [b, n, d], text [b, t, d] and key_bias float32 [b, t] or None -> [b, n, d]."""
    return self.prefill(x, text, key_bias)[0]

  def prefill(self, x: jax.Array, text: jax.Array | None, key_bias: jax.Array | None) -> tuple[jax.Array, KeysValues]:
    """Returns the output of __call__, and keys and values [b, n, h, e] of x."""
    x = layout.constrain(x, "batch", None, None)
    position = jnp.arange(x.shape[1], dtype=jnp.int32)
    y, keys_values = self.attention(self.norm_1(x), position[:, None] >= position)
    x = x + y
    if self.choices.cross_attention:
      assert text is not None and key_bias is not None
      x = x + self.cross(self.norm_2(x), text, key_bias)
    return self._add_mlp(x), keys_values

  def text_keys_values(self, text: jax.Array) -> KeysValues:
    """text [b, t, d] -> keys and values [b, t, h, e]."""
    return self.cross.keys_values(text)

  def step(
    self, x: jax.Array, cache: KeysValues, text: KeysValues | None, key_bias: jax.Array | None, position: jax.Array
  ) -> tuple[jax.Array, KeysValues]:
    """As __call__ for x [b, 1, d] at `position`; returns the output [b, 1, d] and the cache with that position.

    Args:
      x: [b, 1, d].
      cache: keys and values of the positions before, [b, h, n, e].
      text: keys and values of the text [b, h, t, e], or None.
      key_bias: float32 [b, t], or None.
      position: int [].
    """
    x = layout.constrain(x, "batch", None, None)
    y, cache = self.attention.step(self.norm_1(x), cache, position)
    x = x + y
    if self.choices.cross_attention:
      assert text is not None and key_bias is not None
      x = x + self.cross.step(self.norm_2(x), text, key_bias)
    return self._add_mlp(x), cache


def sincos_table(length: int, width: int) -> np.ndarray:
  """Returns the fixed table of positions [length, width] of the reference, float64.

  Position 0 is zero. Position i > 0 is entry i - 1 of a 2D sin-cos table whose other coordinate is always 0: its
  first half is [0 ..., 1 ...].
  """
  frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
  angles = np.arange(length - 1)[:, None] * frequencies
  zero, one = np.zeros_like(angles), np.ones_like(angles)
  table = np.concatenate([zero, one, np.sin(angles), np.cos(angles)], -1)
  return np.concatenate([np.zeros((1, width)), table])


class ARTransformer(nn.Module):
  """Embedding, blocks, final norm and readout."""

  choices: layers.BlockChoices
  depth: int
  num_ids: int  # ids of the input
  num_outputs: int  # ids of the output: one more with a stop id
  num_tokens: int
  num_classes: int  # 0: none
  pos_embed: str
  head_layernorm: bool
  readout_multiplier: float
  readout_bias: bool = False
  remat: str = "none"  # a key of layers.REMATS

  def setup(self) -> None:
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
    self.blocks = layers.with_remat(CausalBlock, self.remat)(c)
    self.norm = layers.norm(c.norm, c.norm_eps, c.dtype)
    if self.head_layernorm:
      self.head_norm = layers.norm("layernorm", 0.0, c.dtype)
    shape, axes = (c.width, self.num_outputs), ("embed", "vocab")
    self.readout = _Readout(shape, axes, self.readout_bias)

  def start_vector(self, labels: jax.Array) -> jax.Array:
    """labels int [b], -1 for none -> the input of position 0, without the position embedding, [b, d] float32."""
    start = jnp.broadcast_to(self.start, (labels.shape[0], self.choices.width))
    if not self.num_classes:
      return start
    return start + jnp.where((labels >= 0)[:, None], self.class_embedding[jnp.maximum(labels, 0)], 0)

  def add_positions(self, x: jax.Array, position: jax.Array) -> jax.Array:
    """Adds position embeddings: x [b, n, d] float32 at positions int [n] -> input of the blocks [b, n, d] of dtype."""
    return (x + self.positions[position]).astype(self.choices.dtype)

  def embed(self, ids: jax.Array) -> jax.Array:
    """ids int [...] -> [..., d] float32."""
    return self.embedding[ids]

  def inputs(self, ids: jax.Array, labels: jax.Array) -> jax.Array:
    """ids int [b, n] -> input of the blocks [b, n, d]: the start vector and all ids but the last."""
    # [b, 1, d], [b, n - 1, d] -> [b, n, d]
    x = jnp.concatenate([self.start_vector(labels)[:, None], self.embed(ids[:, :-1])], 1)
    return self.add_positions(x, jnp.arange(ids.shape[1], dtype=jnp.int32))

  def finish(self, x: jax.Array) -> jax.Array:
    """Applies the final norms: output of the last block -> input of the readout, both [..., d]."""
    x = self.norm(layout.constrain(x, "batch", *(None,) * (x.ndim - 1)))
    return self.head_norm(x) if self.head_layernorm else x

  def hidden(
    self, ids: jax.Array, labels: jax.Array, text: jax.Array | None = None, key_bias: jax.Array | None = None
  ) -> jax.Array:
    """Returns the input of the readout [b, n, d]: for each of the ids, computed from the ids before it.

    Args:
      ids: int [b, n].
      labels: int [b], -1 for none; ignored by models without classes.
      text: projected features [b, t, d], or None.
      key_bias: float32 [b, t], attention.MASKED at padding, or None.
    """
    step = lambda block, x, _, text, key_bias: block(x, text, key_bias)
    x = layers.scan_blocks(step, self.depth, self.blocks, self.inputs(ids, labels), None, text, key_bias)
    return self.finish(x)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """hidden [..., d] -> float32 [..., num_outputs]."""
    return self.readout(self.readout_multiplier * hidden)

  def __call__(
    self, ids: jax.Array, labels: jax.Array, text: jax.Array | None = None, key_bias: jax.Array | None = None
  ) -> jax.Array:
    """Returns logits float32 [b, n, num_outputs] under teacher forcing; arguments as for hidden."""
    return self.logits(self.hidden(ids, labels, text, key_bias))

  def losses(self, hidden: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """Returns the cross-entropy of targets in nats.

    Args:
      hidden: [b, n, d].
      targets: int [b, n].
      chunk: largest number of positions whose logits exist at once, forward and backward: [b, chunk, num_outputs], not
        [b, n, num_outputs].

    Returns:
      float32 [b, n].
    """
    batch, length = targets.shape
    chunk = max(size for size in range(1, min(chunk, length) + 1) if length % size == 0)
    # [b, n, ...] -> [n / chunk, b, chunk, ...]
    by_chunk = lambda x: x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
    readout = self.readout.function(hidden.dtype)

    @jax.checkpoint
    def losses(part):
      x, target = part
      logits = readout(self.readout_multiplier * x)  # [b, chunk, num_outputs]
      # logsumexp minus the logit of the target: no second array of the size of the logits.
      chosen = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
      return jax.nn.logsumexp(logits, -1) - chosen

    # [n / chunk, b, chunk] -> [b, n]
    return jax.lax.map(losses, (by_chunk(hidden), by_chunk(targets))).swapaxes(0, 1).reshape(batch, length)


class _Readout(nn.Module):
  """A linear layer with float32 outputs."""

  shape: tuple[int, int]
  axes: tuple[str, str]
  use_bias: bool

  def setup(self) -> None:
    self.kernel = self.param("kernel", layers.normal(0.02, *self.axes), self.shape)
    if self.use_bias:
      self.bias = self.param("bias", layers.zeros(self.axes[1]), self.shape[1:])

  def function(self, dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
    """Returns a pure function x [..., d] of dtype -> float32 [..., outputs]."""
    bias = self.bias if self.use_bias else 0.0
    kernel = layout.gather(self.kernel.astype(dtype), None, self.axes[1])  # gathered once for all calls

    def readout(x):
      y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32) + bias
      return layout.constrain(y, "batch", *(None,) * (y.ndim - 2), "vocab")

    return readout

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.function(x.dtype)(x)


class TextMLP(nn.Module):
  """Projects text features to the generator's width: two linear layers without bias, tanh-GELU between them."""

  hidden: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = layers.dense(self.hidden, (None, "mlp"), "in", self.dtype, use_bias=False)(x)
    return layers.dense(self.width, ("mlp", "embed"), "out", self.dtype, use_bias=False)(nn.gelu(x, approximate=True))


class Generator(nn.Module):
  """The transformer and the modules that turn a text into its condition.

  Attributes:
    ar: the transformer.
    text_mlp: projects text features; None without text.
    text: text encoder that is trained jointly, called as text(text_ids, text_lengths); None if features are given.
  """

  ar: ARTransformer
  text_mlp: TextMLP | Any = None
  text: nn.Module | Any = None

  def project(self, features: jax.Array | None, lengths: jax.Array | None) -> tuple:
    """Text features [b, t, f] and lengths [b] -> (text [b, t, d], key_bias [b, t]); (None, None) without text."""
    if self.text_mlp is None or features is None or lengths is None:
      return None, None
    features = features.astype(self.ar.choices.dtype)
    return self.text_mlp(features), attention.padding_bias(lengths, features.shape[1])

  def encode_text(self, text_ids: jax.Array, text_lengths: jax.Array) -> jax.Array:
    """text_ids int [b, t], text_lengths [b] -> features [b, t, f]."""
    return self.text(text_ids, text_lengths)

  def hidden(
    self, ids: jax.Array, labels: jax.Array, features: jax.Array | None = None, text_lengths: jax.Array | None = None
  ) -> jax.Array:
    """See ARTransformer.hidden; features [b, t, f] as encode_text returns them."""
    return self.ar.hidden(ids, labels, *self.project(features, text_lengths))

  def __call__(
    self, ids: jax.Array, labels: jax.Array, features: jax.Array | None = None, text_lengths: jax.Array | None = None
  ) -> jax.Array:
    """Returns logits float32 [b, n, num_outputs] of ids [b, n] under teacher forcing."""
    return self.ar.logits(self.hidden(ids, labels, features, text_lengths))

  def losses(
    self,
    ids: jax.Array,
    labels: jax.Array,
    targets: jax.Array,
    chunk: int,
    features: jax.Array | None = None,
    text_lengths: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the cross-entropy [b, n] of targets, see ARTransformer.losses."""
    return self.ar.losses(self.hidden(ids, labels, features, text_lengths), targets, chunk)
