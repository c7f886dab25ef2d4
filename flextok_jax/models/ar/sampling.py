"""Generation: one loop over tokens with cached keys and values, and beside it the plain one that recomputes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models.ar.generator import Block, Generator
from flextok_jax.ops import layout, nested, sampling

PLAIN_CHUNK = 32  # the plain path recomputes prefixes of a multiple of this length: one program for each


@dataclasses.dataclass(frozen=True)
class Choices:
  """How tokens are chosen, as far as another choice is another program."""

  guided: bool = False
  greedy: bool = False
  top_k: int = 0
  use_top_p: bool = False
  fast: bool = True


def slots(num_tokens: int, most: int) -> int:
  """Returns the length of the arrays that draw num_tokens of at most `most`: one of a few, so few programs are made."""
  return next(size for size in nested.slot_sizes(most) if size >= num_tokens)


def generate(
  model: Generator,
  params: dict,
  keys: jax.Array,
  labels: jax.Array,
  features: jax.Array | None,
  text_lengths: jax.Array | None,
  prefix: jax.Array,
  num_tokens: int | jax.Array,
  guidance_scale: float | jax.Array,
  temperature: float | jax.Array,
  top_p: float | jax.Array,
  *,
  slots: int,
  choices: Choices,
) -> tuple[jax.Array, jax.Array]:
  """Draws token ids one after another; to be jitted by the caller.

  Args:
    keys: of each sample [b]; sample i depends on keys[i] alone, whatever its neighbours.
    labels: int [b], -1 for none; with guidance [2 b]: conditional half first.
    features: of the text, [b or 2 b, t, f] as for labels, or None.
    text_lengths: int, as features.
    prefix: int [b, p], p >= 0, tokens to go on from.
    num_tokens: of the outcome, p < num_tokens <= slots.
    guidance_scale: guided logits are u + guidance_scale (c - u).
    temperature: see ops/sampling.py.
    top_p: see ops/sampling.py.
    slots: length of the arrays.
    choices: see Choices.

  Returns:
    ids int32 [b, slots] and log-probabilities float32 [b, slots]: of each token under the guided logits, before
    temperature, top-k and top-p; 0 for the prefix. The first token is never the stop, and its probability is among the
    others. Where a sample has stopped, and past num_tokens, ids are num_ids and log-probabilities 0; that of the stop
    itself stands at its place.
  """
  batch, given = prefix.shape
  # What is never written stays num_ids: the stop id, where there is one.
  ids = jnp.full((batch, slots), model.ar.num_ids, jnp.int32).at[:, :given].set(prefix)
  runner = (_Cached if choices.fast else _Recomputed)(model, params, labels, features, text_lengths, slots)
  stops = model.ar.num_outputs > model.ar.num_ids

  def body(state, end):
    i, ids, log_probs, done, carried = state
    hidden, carried = runner.hidden(ids, i, carried, end)
    if choices.guided:  # before the readout, which is linear: half the rows, the same logits
      guided = sampling.guide(*jnp.split(hidden.astype(jnp.float32), 2), guidance_scale)
      hidden = guided.astype(hidden.dtype)
    logits = model.ar.apply({"params": params["ar"]}, hidden, method="logits")
    if stops:  # at least one token
      logits = logits.at[:, -1].set(jnp.where(i == 0, -jnp.inf, logits[:, -1]))
    if choices.greedy:
      token = logits.argmax(-1).astype(jnp.int32)
    else:
      filtered = sampling.filter_logits(logits, temperature, choices.top_k, top_p if choices.use_top_p else None)
      token = sampling.sample(jax.vmap(jax.random.fold_in, (0, None))(keys, i), filtered)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1)[:, 0]
    ids = layout.constrain(ids.at[:, i].set(jnp.where(done, model.ar.num_ids, token)), "batch", None)
    log_probs = log_probs.at[:, i].set(jnp.where(done, 0.0, chosen))
    return i + 1, ids, log_probs, done | (token == model.ar.num_ids), carried

  state = jnp.int32(given), ids, jnp.zeros((batch, slots)), jnp.zeros(batch, bool), runner.start(prefix)
  for end in runner.stages(given):
    go_on = lambda state, end=end: (state[0] < jnp.minimum(num_tokens, end)) & ~state[3].all()
    state = jax.lax.while_loop(go_on, lambda state, end=end: body(state, end), state)
  return state[1], state[2]


class _Cached:
  """Each step computes one position; keys and values of those before are kept.

  Blocks are taken apart before the loop: inside, slicing the stack would copy every block's parameters at every step.
  """

  def __init__(self, model, params, labels, features, text_lengths, slots: int):
    self.model, self.params, self.length = model, params, slots
    self.labels, self.choices = labels, model.ar.choices
    self.block = Block(self.choices)
    stack = params["ar"]["blocks"]
    self.blocks = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(model.ar.depth)]
    self.text, self.key_bias = model.apply({"params": params}, features, text_lengths, method="project")
    self.looked = [self._look_at_text(p) for p in self.blocks]
    self.first = self._ar(labels, method="start_vector")

  def _look_at_text(self, params) -> tuple[jax.Array, jax.Array] | None:
    """A block's keys and values [b, h, t, e] of the text, if there is one."""
    if self.text is None:
      return None
    return tuple(x.swapaxes(1, 2) for x in self._block(params, self.text, method="look_at"))

  def _ar(self, *args, method):
    return self.model.ar.apply({"params": self.params["ar"]}, *args, method=method)

  def _block(self, params, *args, method):
    return self.block.apply({"params": params}, *args, method=method)

  def stages(self, given: int) -> tuple[int, ...]:
    return (self.length,)

  def start(self, prefix: jax.Array) -> list:
    """Returns the caches [b, h, slots, e] of all blocks, filled with the prefix but its last token."""
    c = self.choices
    rows, given = len(self.labels), prefix.shape[1]
    shape = rows, c.width // c.head_dim, self.length, c.head_dim
    caches = [tuple(jnp.zeros(shape, c.dtype) for _ in range(2)) for _ in self.blocks]
    if not given:
      return caches
    prefix = jnp.tile(prefix, (rows // len(prefix), 1))
    x = self._ar(prefix, self.labels, method="inputs")
    for i, params in enumerate(self.blocks):
      x, kv = self._block(params, x, self.text, self.key_bias, method="fill")
      caches[i] = tuple(old.at[:, :, :given].set(new.swapaxes(1, 2)) for old, new in zip(caches[i], kv))
    return caches

  def hidden(self, ids: jax.Array, i: jax.Array, caches: list, end: int) -> tuple[jax.Array, list]:
    """Returns what the readout reads for token i, [rows, d], and the caches with position i."""
    del end  # the caches hold all
    rows = len(self.labels)
    last = jnp.tile(ids[:, i - 1], rows // len(ids))
    x = jnp.where(i == 0, self.first, self._ar(jnp.minimum(last, self.model.ar.num_ids - 1), method="embed"))
    x = self._ar(x[:, None], i[None], method="place")
    new = []
    for params, cache, looked in zip(self.blocks, caches, self.looked):
      x, cache = self._block(params, x, cache, looked, self.key_bias, i, method="step")
      new.append(cache)
    return self._ar(x[:, 0], method="finish"), new


class _Recomputed:
  """Each step computes the whole prefix anew, its length rounded up to a multiple of PLAIN_CHUNK."""

  def __init__(self, model, params, labels, features, text_lengths, slots: int):
    self.slots = slots

    def run(ids):
      ids = jnp.minimum(jnp.tile(ids, (len(labels) // len(ids), 1)), model.ar.num_ids - 1)
      return model.apply({"params": params}, ids, labels, features, text_lengths, method="hidden")

    self.run = run

  def stages(self, given: int) -> tuple[int, ...]:
    ends = np.minimum(np.arange(PLAIN_CHUNK, self.slots + PLAIN_CHUNK, PLAIN_CHUNK), self.slots)
    return tuple(int(end) for end in ends if end > given)

  def start(self, prefix: jax.Array) -> tuple:
    return ()

  def hidden(self, ids: jax.Array, i: jax.Array, nothing: tuple, end: int) -> tuple[jax.Array, tuple]:
    """Returns what the readout reads for token i, [rows, d], from the first `end` of ids."""
    return self.run(ids[:, :end])[:, i], nothing
