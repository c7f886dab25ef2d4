"""Generation: one loop over tokens with cached keys and values, and a slow reference implementation without caches."""

import dataclasses
import functools

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
    temperature: see ops/sampling.py.
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
  # Entries that are never written stay num_ids: the stop id, if the model has one.
  ids = jnp.full((batch, length), model.ar.num_ids, jnp.int32).at[:, :given].set(prefix)
  runner = (_Cached if fast else _Recomputed)(model, params, labels, features, text_lengths, length)
  stops = model.ar.num_outputs > model.ar.num_ids

  def unfinished(end, state):
    return (state[0] < jnp.minimum(num_tokens, end)) & ~state[3].all()

  def step(end, state):
    i, ids, log_probs, done, carried = state
    hidden, carried = runner.hidden(ids, i, carried, end)
    if sampler.guidance_scale is not None:  # before the readout, which is linear: half the rows, the same logits
      # [2 b, d] -> [b, d]
      guided = sampling.guide(*jnp.split(hidden.astype(jnp.float32), 2), sampler.guidance_scale)
      hidden = guided.astype(hidden.dtype)
    logits = model.ar.apply({"params": params["ar"]}, hidden, method="logits")
    if stops:  # at least one token
      logits = logits.at[:, -1].set(jnp.where(i == 0, -jnp.inf, logits[:, -1]))
    if sampler.greedy:
      token = logits.argmax(-1).astype(jnp.int32)
    else:
      filtered = sampling.filter_logits(logits, sampler.temperature, sampler.top_k, sampler.top_p)
      token = sampling.sample(jax.vmap(jax.random.fold_in, (0, None))(keys, i), filtered)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1)[:, 0]
    ids = layout.constrain(ids.at[:, i].set(jnp.where(done, model.ar.num_ids, token)), "batch", None)
    log_probs = log_probs.at[:, i].set(jnp.where(done, 0.0, chosen))
    return i + 1, ids, log_probs, done | (token == model.ar.num_ids), carried

  state = jnp.int32(given), ids, jnp.zeros((batch, length), jnp.float32), jnp.zeros(batch, bool), runner.start(prefix)
  for end in runner.stages(given):
    state = jax.lax.while_loop(functools.partial(unfinished, end), functools.partial(step, end), state)
  return state[1], state[2]


class _Cached:
  """Computes one position per step; keys and values of earlier positions are cached.

  The stacked parameters are split into blocks before the loop: slicing inside it would copy them in every step.
  """

  def __init__(self, model, params, labels, features, text_lengths, length: int):
    self.model, self.params, self.length = model, params, length
    self.labels, self.choices = labels, model.ar.choices
    self.block = CausalBlock(self.choices)
    stack = params["ar"]["blocks"]
    self.blocks = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(model.ar.depth)]
    self.text, self.key_bias = model.apply({"params": params}, features, text_lengths, method="project")
    self.text_caches = [self._text_cache(p) for p in self.blocks]
    self.first = self._ar(labels, method="start_vector")

  def _text_cache(self, params) -> tuple[jax.Array, ...] | None:
    """Returns a block's keys and values [b, h, t, e] of the text, if there is one."""
    if self.text is None:
      return None
    return tuple(x.swapaxes(1, 2) for x in self._block(params, self.text, method="text_keys_values"))

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
    rows, given = len(self.labels), prefix.shape[1]
    shape = rows, c.width // c.head_dim, self.length, c.head_dim
    caches = [tuple(jnp.zeros(shape, c.dtype) for _ in range(2)) for _ in self.blocks]
    if not given:
      return caches
    prefix = jnp.tile(prefix, (rows // len(prefix), 1))
    x = self._ar(prefix, self.labels, method="inputs")
    for i, params in enumerate(self.blocks):
      x, kv = self._block(params, x, self.text, self.key_bias, method="prefill")
      caches[i] = tuple(old.at[:, :, :given].set(new.swapaxes(1, 2)) for old, new in zip(caches[i], kv))
    return caches

  def hidden(self, ids: jax.Array, i: jax.Array, caches: list, end: int) -> tuple[jax.Array, list]:
    """Returns the input of the readout for token i, [rows, d], and the caches with position i."""
    del end  # the caches hold all positions
    rows = len(self.labels)
    last = jnp.tile(ids[:, i - 1], rows // len(ids))
    x = jnp.where(i == 0, self.first, self._ar(jnp.minimum(last, self.model.ar.num_ids - 1), method="embed"))
    x = self._ar(x[:, None], i[None], method="add_positions")
    new = []
    for params, cache, text in zip(self.blocks, caches, self.text_caches):
      x, cache = self._block(params, x, cache, text, self.key_bias, i, method="step")
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
