"""Stage 2: a generator of token ids, trained by next-token cross-entropy on token shards."""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.models import layers
from flextok_jax.models.activations import of_blocks, of_logits
from flextok_jax.models.ar.generator import ARTransformer, Generator, TextMLP
from flextok_jax.models.ar.text import ByteEncoder
from flextok_jax.models.perception.t5 import T5Encoder
from flextok_jax.ops import nested
from flextok_jax.stages.stage import Maps, Params, Stage


def mlp_hidden(c: ConfigDict) -> int:
  """Returns the hidden width of the MLP of config.ar `c`; a gated one has two thirds of it, rounded up."""
  hidden = int(c.mlp_ratio * c.width)
  if c.ffn == "mlp_gelu":
    return hidden
  return -(-int(2 * hidden / 3) // c.ffn_multiple_of) * c.ffn_multiple_of


def make_generator(config: ConfigDict) -> Generator:
  """Builds the generator from config.ar and config.text.

  Raises:
    ValueError: sizes that do not fit together.
  """
  c = config.ar
  if c.width % c.head_dim:
    raise ValueError(f"ar.width {c.width} is not a multiple of ar.head_dim {c.head_dim}")
  if c.pos_embed == "sincos1d" and c.width % 4:
    raise ValueError(f"ar.width {c.width} is not a multiple of 4, which ar.pos_embed 'sincos1d' needs")
  if mlp_hidden(c) < 1:
    raise ValueError(f"ar.mlp_ratio={c.mlp_ratio} of width {c.width} leaves no hidden width: raise it")
  dtype = jnp.dtype(config.dtype)
  text = c.condition == "text"
  gated = c.ffn == "swiglu"
  choices = layers.BlockChoices(
    width=c.width,
    head_dim=c.head_dim,
    mlp_hidden=mlp_hidden(c),
    logit_scale=1 / math.sqrt(c.head_dim),
    gated_mlp=gated,
    activation="silu" if gated else "gelu",
    norm=c.norm,
    norm_eps=c.norm_eps,
    qk_norm=c.qk_norm,
    qk_norm_eps=c.qk_norm_eps,
    qkv_bias=c.bias,
    out_bias=c.bias,
    mlp_bias=c.bias,
    cross_attention=text,
    dtype=dtype,
    attention=config.attention,
  )
  transformer = ARTransformer(
    choices=choices,
    depth=c.depth,
    num_ids=c.num_ids,
    num_outputs=c.num_ids + c.stop,
    num_tokens=c.num_tokens,
    num_classes=c.num_classes if c.condition == "class" else 0,
    pos_embed=c.pos_embed,
    head_layernorm=c.head_layernorm,
    readout_multiplier=c.readout_multiplier,
    readout_bias=c.bias,
    remat=config.remat,
  )
  if not text:
    return Generator(transformer)
  encoder = make_text_encoder(config) if config.text.encoder == "bytes" else None
  return Generator(transformer, TextMLP(config.text.mlp_hidden, c.width, dtype), encoder)


def make_text_encoder(config: ConfigDict, sizes: Mapping | None = None) -> nn.Module:
  """Builds the encoder of config.text: module(ids [b, t], lengths [b]) -> [b, t, text.features].

  Args:
    config: of stage "ar".
    sizes: of a T5, which the config does not hold: as weights/perception/t5.py reads them.

  Raises:
    ValueError: sizes that do not fit together.
  """
  c, dtype = config.text, jnp.dtype(config.dtype)
  if c.encoder == "bytes":
    if c.features % c.head_dim:
      raise ValueError(f"text.features={c.features} is not a multiple of text.head_dim={c.head_dim}")
    return ByteEncoder(
      c.features, c.depth, c.head_dim, c.max_length, c.ngram_rows, dtype, config.attention, config.remat
    )
  if sizes is None:
    raise ValueError("the sizes of the T5 encoder are needed: those of its config.json")
  if sizes["d_model"] != c.features:
    raise ValueError(
      f"text.features={c.features}, but the T5 encoder {c.path} has {sizes['d_model']}: "
      f"set text.features={sizes['d_model']}"
    )
  return T5Encoder(**sizes, dtype=dtype)


class ARStage(Stage):
  """Trains {"ar"} and, conditioned on text, {"text_mlp", "text"}. A T5 is not a part: its features are in the batch."""

  def __init__(self, config: ConfigDict):
    self.config = config
    self.model = make_generator(config)
    self.parts = ("ar",)
    if config.ar.condition == "text":
      self.parts += ("text_mlp",) if self.model.text is None else ("text_mlp", "text")
    self.block_parts = tuple(name for name in self.parts if name != "text_mlp")

  def init_model(self, key: jax.Array) -> tuple[Params, Params]:
    c = self.config
    ids, labels, lengths = jnp.zeros((1, c.ar.num_tokens), jnp.int32), jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
    features = None
    params = {}
    if c.ar.condition == "text":
      features = jnp.zeros((1, 1, c.text.features))
      if self.model.text is not None:
        text_key, key = jax.random.split(key)
        text_ids = jnp.zeros((1, c.text.max_length), jnp.int32)
        params = dict(self.model.init(text_key, text_ids, lengths, method="encode_text")["params"])
    params |= self.model.init(key, ids, labels, features, lengths)["params"]
    return params, {}

  def token_losses(self, params: Params, batch: Mapping) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of each token, the stop id included, and its weight 0 or 1, float32 [b, n] each.

    `batch` is one of data/shards/tokens.py, with text as text_features [b, t, f], or as text_ids for the joint encoder.
    """
    c = self.config.ar
    apply: Callable[..., Any] = functools.partial(self.model.apply, {"params": params})
    ids, length = batch["token_ids"], batch["length"][:, None]
    position = jnp.arange(ids.shape[1], dtype=jnp.int32)
    text: tuple = ()
    if c.condition == "text":
      features = batch.get("text_features")
      if features is None:
        features = apply(batch["text_ids"], batch["text_lengths"], method="encode_text")
      text = (features, batch["text_lengths"])
    targets = jnp.where(position < length, ids, c.num_ids) if c.stop else ids
    losses = apply(ids, batch["label"], targets, c.loss_chunk, *text, method="losses")
    return losses, (position < length + int(c.stop)).astype(jnp.float32)

  def loss_fn(self, params: Params, batch: Mapping, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict]:
    """Returns the mean cross-entropy (nats) over the tokens of the batch; metrics also by position."""
    del key, step  # the data pipeline has dropped conditions already
    losses, counts = self.token_losses(params, batch)
    length = losses.shape[1]
    decay = (1 + jnp.arange(length, dtype=jnp.float32)) ** -float(self.config.ar.position_decay)
    weights = counts * decay / decay.mean()
    metrics = {"loss": ((losses * counts).sum(), counts.sum())}
    low = 0
    for high in nested.powers_of_two(length):  # positions in ranges between powers of two
      part = slice(low, high)
      metrics[f"loss_to_{high}"] = (losses * counts)[:, part].sum(), counts[:, part].sum()
      low = high
    return (losses * weights).sum() / weights.sum(), metrics

  def activation_bytes(self, rows: float, maps: Maps, images: bool) -> float:
    c, transformer = self.config, self.model.ar
    text = c.text.max_length if c.ar.condition == "text" else 0
    tokens = c.ar.num_tokens
    # Without the encoder of "bytes", which is small.
    sizes = transformer.choices, transformer.depth, transformer.remat
    saved, working = of_blocks(*sizes, tokens, tokens, maps(True), text)
    return rows * (saved + max(working, of_logits(min(c.ar.loss_chunk, tokens), transformer.num_outputs)))

  @property
  def predict_fns(self) -> dict[str, Callable]:
    """token_losses(params, batch) -> (losses [b, n], counts [b, n])."""
    return {"token_losses": self.token_losses}
