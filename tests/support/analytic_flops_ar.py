"""Analytic FLOPs of the generator, counted as in analytic_flops.py, and the minimum bytes read per token."""

from ml_collections import ConfigDict
import numpy as np

from flextok_jax.models.ar.sampling import SLOW_CHUNK, padded_length
from flextok_jax.stages.ar import mlp_hidden
from tests.support import analytic_flops as flops
from tests.support.analytic_flops import linear


def is_guided(config: ConfigDict) -> bool:
  """Whether a model of this config is sampled with guidance, so that each sample has two rows."""
  return config.ar.condition != "none" and config.ar.guidance_scale != 1


def block(c: ConfigDict, queries: int, keys: int, text: int) -> int:
  """A block of config.ar: `queries` tokens attend to `keys` tokens, which include them, and to `text` tokens.

  Self-attention: q, k, v, output 8 q d^2; logits and weighted sum 2 q l d each. Cross-attention: query and output
  4 q d^2, and 2 q t d each; the text's keys and values are separate (look_at). MLP: 2 q d h, twice that if gated, and
  2 q h d.
  """
  d, hidden = c.width, mlp_hidden(c)
  attention = 4 * linear(queries, d, d) + 2 * linear(queries, d, keys)
  cross = 2 * linear(queries, d, d) + 2 * linear(queries, d, text) if text else 0
  mlp = linear(queries, d, (2 if c.ffn == "swiglu" else 1) * hidden) + linear(queries, hidden, d)
  return attention + cross + mlp


def text_tokens(config: ConfigDict) -> int:
  """Tokens of a text including padding; 0 without text."""
  return config.text.max_length if config.ar.condition == "text" else 0


def project(config: ConfigDict) -> int:
  """Features of one text to the generator's width: two linear layers."""
  c, length = config.text, text_tokens(config)
  return linear(length, c.features, c.mlp_hidden) + linear(length, c.mlp_hidden, config.ar.width)


def look_at(config: ConfigDict) -> int:
  """Keys and values of one projected text in all blocks."""
  return config.ar.depth * linear(text_tokens(config), config.ar.width, 2 * config.ar.width)


def encode_text(config: ConfigDict) -> int:
  """One text in the jointly trained encoder; 0 for a T5, which is not part of the generator."""
  if text_tokens(config) == 0 or config.text.encoder != "bytes":
    return 0
  return config.text.depth * flops.block(_bytes_part(config), config.text.max_length, config.text.max_length)


def _bytes_part(config: ConfigDict) -> ConfigDict:
  """The byte encoder's blocks as a config section of the tokenizer, which has the same blocks."""
  c = config.text
  return ConfigDict(dict(width=c.features, depth=c.depth, mlp_ratio=4.0, gated_mlp=True))


def readout(config: ConfigDict) -> int:
  """Logits of one token, that of the stop id included."""
  return linear(1, config.ar.width, config.ar.num_ids + config.ar.stop)


def ar_generate(config: ConfigDict, num_tokens: int, batch: int, guided: bool, fast: bool) -> int:
  """Draws num_tokens tokens per sample, and encodes the texts and an empty one if the text encoder is trained jointly.

  Fast: keys and values of the text are computed once; then each step runs one position, which attends to all slots of
  the cache, and one readout. Plain: each step projects the text again and runs the whole prefix, its length rounded up
  to SLOW_CHUNK, and one readout. Guidance mixes the readout's inputs, so a sample has one readout, not two. No sample
  stops early.
  """
  c, text, total = config.ar, text_tokens(config), padded_length(num_tokens, config.ar.num_tokens)
  rows = batch * (2 if guided else 1)
  texts = (batch + (1 if guided else 0)) * encode_text(config)
  if fast:
    steps = project(config) + look_at(config) + num_tokens * c.depth * block(c, 1, total, text)
  else:
    lengths = [min(-(-(i + 1) // SLOW_CHUNK) * SLOW_CHUNK, total) for i in range(num_tokens)]
    steps = num_tokens * (project(config) + look_at(config)) + c.depth * sum(block(c, n, n, text) for n in lengths)
  return texts + rows * steps + batch * num_tokens * readout(config)


def ar_train(config: ConfigDict, batch: int) -> int:
  """Forward and backward pass over all num_tokens positions: three times the forward pass.

  Except: the readout runs forward twice, since its logits are not kept; T5 features have no gradient; and config.remat
  recomputes blocks or parts of them, without the MLPs' outputs, which no gradient needs.
  """
  c, text, length = config.ar, text_tokens(config), config.ar.num_tokens
  blocks = c.depth * block(c, length, length, text) + look_at(config)
  sum_ = 3 * (blocks + project(config) + encode_text(config)) + 4 * length * readout(config)
  if text and not encode_text(config):
    sum_ -= linear(text, config.text.features, config.text.mlp_hidden)
  remat = config.remat
  if remat == "dots":
    sum_ += 2 * c.depth * linear(length, c.width, length + text)  # logits and weighted sums
  elif remat == "full":
    sum_ += blocks - c.depth * linear(length, mlp_hidden(c), c.width)
  if encode_text(config):
    sum_ += flops.computed_again(_bytes_part(config), text, text, remat, outputs=False)
  return batch * sum_


def token_bytes(config: ConfigDict, num_tokens: int, batch: int, guided: bool) -> int:
  """Minimum bytes that a step of the fast path reads: matrices of blocks and readout once, and the caches of all rows.

  Caches include all slots and the text's tokens. Norms, vectors and writes (one position) are not counted.
  """
  c, rows = config.ar, batch * (2 if guided else 1)
  # A product with one row has two FLOPs per element of its matrix.
  matrices = (c.depth * block(c, 1, 0, 0) + readout(config)) // 2
  if text_tokens(config):
    matrices += 2 * c.depth * c.width**2  # cross-attention: query and output
  caches = 2 * c.depth * rows * (padded_length(num_tokens, config.ar.num_tokens) + text_tokens(config)) * c.width
  return (matrices + caches) * np.dtype(config.dtype).itemsize
