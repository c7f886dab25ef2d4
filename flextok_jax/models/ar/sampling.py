"""Generation: one loop over tokens with cached keys and values, and a slow reference implementation without caches."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models.ar.generator import CausalBlock, Generator
from flextok_jax.ops import layout, nested, sampling

SLOW_CHUNK = 32  # the slow path recomputes prefixes whose lengths are multiples of this, one program for each


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["guidance_scale", "temperature", "top_p"],
  meta_fields=["top_k", "greedy"],
)
@dataclasses.dataclass(frozen=True)
class TokenSampler:
  """How `generate` draws tokens.

  A pytree whose leaves are the numbers: an argument of jax.jit, it needs no new program for another number.

  Attributes:
    guidance_scale: guided logits are u + guidance_scale (c - u), of the unconditional u and the conditional c; None:
      no guidance.
    temperature: see ops/sampling.py; this and guidance_scale are numbers, or arrays [num_tokens], one for each token.
    top_p: see ops/sampling.py; None: off.
    top_k: see ops/sampling.py; 0: off.
    greedy: takes the most likely token, whatever temperature, top_k and top_p are.
  """

  guidance_scale: float | jax.Array | None = None
  temperature: float | jax.Array = 1.0
  top_p: float | jax.Array | None = None
  top_k: int = 0
  greedy: bool = False


def padded_length(num_tokens: int, most: int) -> int:
  """Returns the length of arrays for num_tokens of at most `most`: one of a few, so that few programs are compiled."""
  return next(size for size in nested.padded_lengths(most) if size >= num_tokens)


def generate(
  model: Generator,
  params: dict,
  keys: jax.Array,
  labels: jax.Array,
  features: jax.Array | None,
  text_lengths: jax.Array | None,
  prefix: jax.Array,
  num_tokens: int | jax.Array,
  sampler: TokenSampler,
  length: int,
  fast: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Draws token ids one after another; to be jitted by the caller.

  Args:
    model: the generator.
    params: of the model.
    keys: one for each sample [b]; sample i depends only on keys[i], not on its neighbours.
    labels: int [b], -1 for none; with guidance [2 b], the conditional half first.
    features: of the text, [b or 2 b, t, f] as for labels, or None.
    text_lengths: int, as features.
    prefix: int [b, p], p >= 0: the first tokens.
    num_tokens: length of the result, p < num_tokens <= length.
    sampler: how tokens are drawn.
    length: of the arrays.
    fast: False for the slow reference implementation, which recomputes the whole prefix for each token.

  Returns:
    ids int32 [b, length] and log-probabilities float32 [b, length]: of each token under the guided logits, before
    temperature, top-k and top-p; 0 for the prefix. The first token is never the stop id; its probability is normalised
    over the other ids. After a stop id, and past num_tokens, ids are num_ids and log-probabilities 0; the stop id
    itself has its log-probability.
  """
  batch, given = prefix.shape
  if fast:
    text = read_text(model, params, features, text_lengths)
    runner: Any = Cached(model, params, labels, text, length)
  else:
    runner = _Recomputed(model, params, labels, features, text_lengths, length)
  sequences = start(model.ar.num_ids, batch, length)
  sequences = sequences.replace(ids=sequences.ids.at[:, :given].set(prefix), carried=runner.start(prefix))
  position = jnp.int32(given)
  for end in runner.stages(given):
    last = jnp.minimum(num_tokens, end)
    position, sequences = extend(model, params, runner, keys, sampler, position, sequences, last, end)
  return sequences.ids, sequences.log_probs


class Sequences(flax.struct.PyTreeNode):
  """Sequences [b] that are being drawn."""

  ids: jax.Array  # int32 [b, length]; num_ids (the stop id, if there is one) where none was drawn
  log_probs: jax.Array  # float32 [b, length], see generate
  done: jax.Array  # bool [b], whether the stop id was drawn
  carried: Any  # what the runner keeps of the positions before, such as keys and values


def start(num_ids: int, batch: int, length: int) -> Sequences:
  """Returns empty sequences."""
  ids = jnp.full((batch, length), num_ids, jnp.int32)
  return Sequences(ids, jnp.zeros((batch, length), jnp.float32), jnp.zeros(batch, bool), ())


def predict(
  model: Generator, params: dict, runner: Any, sampler: TokenSampler, sequences: Sequences, i: jax.Array, end: int
) -> tuple[jax.Array, Sequences]:
  """Returns the guided logits [b, num_outputs] of token i, and the sequences with what the runner computed for it."""
  hidden, carried = runner.hidden(sequences.ids, i, sequences.carried, end)
  if sampler.guidance_scale is not None:  # before the readout, which is linear: half the rows, the same logits
    # [2 b, d] -> [b, d]
    conditional, unconditional = jnp.split(hidden.astype(jnp.float32), 2)
    guided = sampling.guide(conditional, unconditional, _of_token(sampler.guidance_scale, i))
    hidden = guided.astype(hidden.dtype)
  logits: Any = model.ar.apply({"params": params["ar"]}, hidden, method="logits")
  if model.ar.num_outputs > model.ar.num_ids:  # at least one token before the stop id
    logits = logits.at[:, -1].set(jnp.where(i == 0, -jnp.inf, logits[:, -1]))
  return logits, sequences.replace(carried=carried)


def _of_token(value: float | jax.Array, i: jax.Array) -> float | jax.Array:
  """Returns a number, or entry i of an array of one number for each token."""
  return jnp.asarray(value)[i] if jnp.ndim(value) else value


def append(num_ids: int, sequences: Sequences, i: jax.Array, token: jax.Array, log_prob: jax.Array) -> Sequences:
  """Returns the sequences with token i, [b], and its log-probability; those that have ended stay as they are."""
  done = sequences.done
  ids = sequences.ids.at[:, i].set(jnp.where(done, num_ids, token))
  return sequences.replace(
    ids=layout.constrain(ids, "batch", None),
    log_probs=sequences.log_probs.at[:, i].set(jnp.where(done, 0.0, log_prob)),
    done=done | (token == num_ids),
  )


def extend(
  model: Generator,
  params: dict,
  runner: Any,
  keys: jax.Array,
  sampler: TokenSampler,
  first: jax.Array,
  sequences: Sequences,
  num_tokens: int | jax.Array,
  end: int,
) -> tuple[jax.Array, Sequences]:
  """Draws the tokens from `first` to num_tokens - 1, or until all sequences have ended.

  Returns:
    The number of tokens that the sequences now have, and the sequences.
  """

  def unfinished(state: tuple[jax.Array, Sequences]) -> jax.Array:
    return (state[0] < num_tokens) & ~state[1].done.all()

  def step(state: tuple[jax.Array, Sequences]) -> tuple[jax.Array, Sequences]:
    i, sequences = state
    logits, sequences = predict(model, params, runner, sampler, sequences, i, end)
    if sampler.greedy:
      token = logits.argmax(-1).astype(jnp.int32)
    else:
      filtered = sampling.filter_logits(logits, _of_token(sampler.temperature, i), sampler.top_k, sampler.top_p)
      token = sampling.sample(jax.vmap(jax.random.fold_in, (0, None))(keys, i), filtered)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1)[:, 0]
    return i + 1, append(model.ar.num_ids, sequences, i, token, chosen)

  return jax.lax.while_loop(unfinished, step, (first, sequences))


def branch(
  model: Generator,
  params: dict,
  runner: Any,
  keys: jax.Array,
  sampler: TokenSampler,
  i: jax.Array,
  sequences: Sequences,
  candidates: int,
  replacement: bool,
) -> tuple[jax.Array, jax.Array, Sequences]:
  """Chooses several candidates for token i of each sequence.

  Args:
    model: see generate, as for params, keys and sampler. The most likely tokens if it is greedy, else draws.
    runner: a Cached.
    i: number of the token.
    sequences: with i tokens.
    candidates: how many to choose.
    replacement: whether a token may be drawn twice.

  Returns:
    Tokens int32 [b, candidates], most likely or first drawn first; their log-probabilities, -inf where temperature,
    top-k and top-p leave fewer tokens; and the sequences with what the runner computed, without the token.
  """
  logits, sequences = predict(model, params, runner, sampler, sequences, i, runner.length)
  if sampler.greedy:
    scores = logits
    tokens = sampling.candidates(None, scores, candidates)
  else:
    scores = sampling.filter_logits(logits, _of_token(sampler.temperature, i), sampler.top_k, sampler.top_p)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
    tokens = sampling.candidates(keys, scores, candidates, replacement)
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens, -1)
  allowed = jnp.take_along_axis(scores, tokens, -1) > -jnp.inf
  return tokens, jnp.where(allowed, log_probs, -jnp.inf), sequences


class Text(NamedTuple):
  """A text as the blocks read it."""

  features: jax.Array  # projected [b, t, d]
  key_bias: jax.Array  # float32 [b, t]
  caches: list[tuple[jax.Array, ...]]  # keys and values [b, h, t, e] of each block


def read_text(model: Generator, params: dict, features: jax.Array | None, lengths: jax.Array | None) -> Text | None:
  """Returns a text, features [b, t, f] and lengths int [b], as the blocks read it; None without one."""
  text: Any
  key_bias: Any
  text, key_bias = model.apply({"params": params}, features, lengths, method="project")
  if text is None:
    return None
  block, caches = CausalBlock(model.ar.choices), []
  for p in _blocks(model, params):
    keys_values: Any = block.apply({"params": p}, text, method="text_keys_values")
    caches.append(tuple(x.swapaxes(1, 2) for x in keys_values))
  return Text(text, key_bias, caches)


def _blocks(model: Generator, params: dict) -> list:
  """Returns the parameters of each block. Slicing the stack inside a loop would copy them in every step."""
  return [jax.tree.map(lambda x, i=i: x[i], params["ar"]["blocks"]) for i in range(model.ar.depth)]


class Cached:
  """Computes one position per step; keys and values of earlier positions are cached."""

  def __init__(self, model: Generator, params: dict, labels: jax.Array, text: Text | None, length: int):
    self.model, self.params, self.length = model, params, length
    self.labels, self.choices, self.text = labels, model.ar.choices, text
    self.block = CausalBlock(self.choices)
    self.blocks = _blocks(model, params)
    self.first = self._ar(labels, method="start_vector")

  def _ar(self, *args, method):
    return self.model.ar.apply({"params": self.params["ar"]}, *args, method=method)

  def _block(self, params, *args, method):
    return self.block.apply({"params": params}, *args, method=method)

  def stages(self, given: int) -> tuple[int, ...]:
    """Returns the lengths up to which each loop runs: a single loop."""
    return (self.length,)

  def start(self, prefix: jax.Array) -> list:
    """Returns the caches [b, h, length, e] of all blocks, filled with the prefix except for its last token."""
    c = self.choices
    rows, given = self.labels.shape[0], prefix.shape[1]
    shape = rows, c.width // c.head_dim, self.length, c.head_dim
    caches = [tuple(jnp.zeros(shape, c.dtype) for _ in range(2)) for _ in self.blocks]
    if not given:
      return caches
    prefix = jnp.tile(prefix, (rows // prefix.shape[0], 1))
    x = self._ar(prefix, self.labels, method="inputs")
    for i, params in enumerate(self.blocks):
      text = self.text[:2] if self.text else (None, None)
      x, kv = self._block(params, x, *text, method="prefill")
      caches[i] = tuple(old.at[:, :, :given].set(new.swapaxes(1, 2)) for old, new in zip(caches[i], kv))
    return caches

  def hidden(self, ids: jax.Array, i: jax.Array, caches: list, end: int) -> tuple[jax.Array, list]:
    """Returns the input of the readout for token i, [rows, d], and the caches with position i."""
    del end  # the caches hold all positions
    rows = self.labels.shape[0]
    last = jnp.tile(ids[:, i - 1], rows // ids.shape[0])
    x = jnp.where(i == 0, self.first, self._ar(jnp.minimum(last, self.model.ar.num_ids - 1), method="embed"))
    x = self._ar(x[:, None], i[None], method="add_positions")
    new = []
    text_caches, key_bias = (self.text.caches, self.text.key_bias) if self.text else ([None] * len(caches), None)
    for params, cache, text in zip(self.blocks, caches, text_caches):
      x, cache = self._block(params, x, cache, text, key_bias, i, method="step")
      new.append(cache)
    return self._ar(x[:, 0], method="finish"), new


class _Recomputed:
  """Recomputes the whole prefix in each step, its length rounded up to a multiple of SLOW_CHUNK."""

  def __init__(self, model, params, labels, features, text_lengths, length: int):
    self.length = length

    def run(ids):
      ids = jnp.minimum(jnp.tile(ids, (len(labels) // len(ids), 1)), model.ar.num_ids - 1)
      return model.apply({"params": params}, ids, labels, features, text_lengths, method="hidden")

    self.run = run

  def stages(self, given: int) -> tuple[int, ...]:
    """Returns the lengths up to which each loop runs, from `given` tokens."""
    ends = np.minimum(np.arange(SLOW_CHUNK, self.length + SLOW_CHUNK, SLOW_CHUNK), self.length)
    return tuple(int(end) for end in ends if end > given)

  def start(self, prefix: jax.Array) -> tuple:
    return ()

  def hidden(self, ids: jax.Array, i: jax.Array, state: tuple, end: int) -> tuple[jax.Array, tuple]:
    """Returns the input of the readout for token i, [rows, d], computed from the first `end` ids."""
    return self.run(ids[:, :end])[:, i], state
