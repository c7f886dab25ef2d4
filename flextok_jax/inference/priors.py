"""What a search draws tokens from: a generator with cached keys and values, or codes that are equally likely."""

import dataclasses
import functools
import math
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models.ar import sampling
from flextok_jax.models.ar.generator import Generator
from flextok_jax.ops import sampling as token_ops
from flextok_jax.parallel import batching, sharding

Chosen = tuple[int, Any, Any]  # a token's number i, and for each row the token [rows] and its log-probability [rows]


class Rows(flax.struct.PyTreeNode):
  """Sequences of several prompts, and what their prompts are."""

  sequences: sampling.Sequences
  owner: jax.Array  # int [rows], the prompt of each row
  labels: Any = None  # int [prompts]; with guidance [2 prompts], the conditional half first
  text: Any = None  # sampling.Text of as many rows as labels, or None


class Prior(Protocol):
  """A distribution of token ids; rows are drawn independently, each by its own key."""

  @property
  def num_ids(self) -> int:
    """Number of the token ids."""

  @property
  def num_tokens(self) -> int:
    """Largest number of tokens."""

  @property
  def stop_id(self) -> int | None:
    """The id that ends a sequence; None without one."""

  def on(self, mesh: Any) -> "Prior":
    """Returns the prior with its arrays on the devices of a mesh."""

  def start(self, prompts: np.ndarray, length: int, mesh: Any) -> Rows:
    """Returns an empty sequence for each of the prompts int [n], with room for `length` tokens."""

  def extend(self, rows: Rows, keys: jax.Array, first: int, num_tokens: int, greedy: bool) -> Rows:
    """Draws the tokens from `first` to num_tokens - 1."""

  def branch(
    self, rows: Rows, keys: jax.Array, i: int, count: int, greedy: bool, replacement: bool
  ) -> tuple[jax.Array, jax.Array, Rows]:
    """Returns candidates for token i: ids and log-probabilities [rows, count], and the rows, without the token."""


@dataclasses.dataclass(frozen=True)
class GeneratorPrior:
  """The prior of a generator under prompts."""

  model: Generator
  params: Any
  labels: np.ndarray  # int [p], -1 for none
  text: Any  # features [p, t, f] and lengths [p], or None
  null_text: Any  # the same of the unconditional half with guidance, [p, ...]
  sampler: sampling.TokenSampler

  @property
  def num_ids(self) -> int:
    """Number of the token ids."""
    return self.model.ar.num_ids

  @property
  def num_tokens(self) -> int:
    """Largest number of tokens."""
    return self.model.ar.num_tokens

  @property
  def stop_id(self) -> int | None:
    """See ARGenerator."""
    return self.num_ids if self.model.ar.num_outputs > self.num_ids else None

  def on(self, mesh: Any) -> "GeneratorPrior":
    """See Prior."""
    return dataclasses.replace(self, params=batching.replicate(self.params, mesh))

  def start(self, prompts: np.ndarray, length: int, mesh: Any) -> Rows:
    """See Prior."""
    cut = lambda tree: sharding.place(
      jax.tree.map(lambda x: np.asarray(x)[prompts if len(x) > 1 else 0 * prompts], tree),
      sharding.batch_sharding(mesh) if mesh else None,
    )
    arguments = cut(self.labels), cut(self.text), cut(self.null_text)
    return _start(self.model, self.params, *arguments, self.sampler, length=length)

  def extend(self, rows: Rows, keys: jax.Array, first: int, num_tokens: int, greedy: bool) -> Rows:
    """See Prior."""
    sampler = dataclasses.replace(self.sampler, greedy=greedy)
    return _extend(self.model, self.params, rows, keys, sampler, np.int32(first), np.int32(num_tokens))

  def branch(
    self, rows: Rows, keys: jax.Array, i: int, count: int, greedy: bool, replacement: bool
  ) -> tuple[jax.Array, jax.Array, Rows]:
    """See Prior."""
    sampler = dataclasses.replace(self.sampler, greedy=greedy)
    return _branch(self.model, self.params, rows, keys, sampler, np.int32(i), count=count, replacement=replacement)


@dataclasses.dataclass(frozen=True)
class Uniform:
  """All ids are equally likely."""

  num_ids: int
  num_tokens: int
  stop_id: int | None = None

  def on(self, mesh: Any) -> "Uniform":
    """See Prior."""
    return self

  def start(self, prompts: np.ndarray, length: int, mesh: Any) -> Rows:
    """See Prior."""
    del mesh
    sequences = sampling.start(self.num_ids, len(prompts), length)
    return Rows(sequences, jnp.arange(len(prompts), dtype=jnp.int32))

  def extend(self, rows: Rows, keys: jax.Array, first: int, num_tokens: int, greedy: bool) -> Rows:
    """See Prior."""
    del greedy  # no id is more likely than another
    return rows.replace(sequences=_uniform(rows.sequences, keys, np.int32(first), np.int32(num_tokens), self.num_ids))

  def branch(
    self, rows: Rows, keys: jax.Array, i: int, count: int, greedy: bool, replacement: bool
  ) -> tuple[jax.Array, jax.Array, Rows]:
    """See Prior."""
    del greedy
    keys = _fold(keys, np.uint32(i))
    scores = jnp.zeros((len(rows.owner), self.num_ids), jnp.float32)
    tokens = token_ops.candidates(keys, scores, count, replacement)
    return tokens, jnp.full(tokens.shape, -math.log(self.num_ids), jnp.float32), rows


def fold(keys: jax.Array, numbers: Any) -> jax.Array:
  """Returns fold_in(keys[i], numbers[i]) of keys [n]."""
  return jax.vmap(jax.random.fold_in)(keys, np.asarray(numbers, np.uint32))


def take(prior: Prior, rows: Rows, which: Any, length: int, chosen: Chosen | None = None) -> Rows:
  """Returns the rows `which` int [n], with room for `length` tokens, and with the tokens that are chosen for them."""
  arrays = None if chosen is None else (np.int32(chosen[0]), *map(np.asarray, chosen[1:]))
  return _take(rows, np.asarray(which, np.int32), arrays, num_ids=prior.num_ids, length=length)


_fold = jax.jit(jax.vmap(jax.random.fold_in, (0, None)))


def _precise(function: Any) -> Any:
  """Makes float32 mean float32 in a function of (model, ...): accelerators multiply in fewer bits by default."""

  @functools.wraps(function)
  def precise(model: Generator, *args: Any, **kwargs: Any) -> Any:
    with jax.default_matmul_precision("highest" if model.ar.choices.dtype == jnp.float32 else None):
      return function(model, *args, **kwargs)

  return precise


@functools.partial(jax.jit, static_argnames=("model", "length"))
@_precise
def _start(
  model: Generator,
  params: Any,
  labels: jax.Array,
  text: Any,
  null_text: Any,
  sampler: sampling.TokenSampler,
  length: int,
) -> Rows:
  count = len(labels)
  if sampler.guidance_scale is not None:
    labels = jnp.concatenate([labels, jnp.full_like(labels, -1)])
    text = None if text is None else join_texts(text, null_text)
  read = sampling.read_text(model, params, *(text or (None, None)))
  runner = sampling.Cached(model, params, labels, read, length)
  sequences = sampling.start(model.ar.num_ids, count, length)
  sequences = sequences.replace(carried=runner.start(jnp.zeros((count, 0), jnp.int32)))
  return Rows(sequences, jnp.arange(count, dtype=jnp.int32), labels, read)


def join_texts(text: tuple[Any, Any], null_text: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
  """Appends the unconditional half's text, of one row or b, padding both to the same t: [2 b, t, f] and [2 b]."""
  (features, lengths), (null_features, null_lengths) = text, null_text
  batch, size = features.shape[0], max(features.shape[1], null_features.shape[1])
  null_features = jnp.broadcast_to(null_features, (batch, *null_features.shape[1:]))
  both = [jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0))) for x in (features, null_features)]
  return jnp.concatenate(both), jnp.concatenate([lengths, jnp.broadcast_to(null_lengths, (batch,))])


def _runner(model: Generator, params: Any, rows: Rows, sampler: sampling.TokenSampler) -> sampling.Cached:
  """Returns the runner of rows: their prompts' labels and texts are repeated."""
  which = rows.owner
  if sampler.guidance_scale is not None:
    which = jnp.concatenate([which, which + len(rows.labels) // 2])
  text = jax.tree.map(lambda x: x[which], rows.text)
  return sampling.Cached(model, params, rows.labels[which], text, rows.sequences.ids.shape[1])


@functools.partial(jax.jit, static_argnames="model")
@_precise
def _extend(
  model: Generator,
  params: Any,
  rows: Rows,
  keys: jax.Array,
  sampler: sampling.TokenSampler,
  first: jax.Array,
  num_tokens: jax.Array,
) -> Rows:
  runner, sequences = _runner(model, params, rows, sampler), rows.sequences
  end = runner.length
  return rows.replace(
    sequences=sampling.extend(model, params, runner, keys, sampler, first, sequences, num_tokens, end)[1]
  )


@functools.partial(jax.jit, static_argnames=("model", "count", "replacement"))
@_precise
def _branch(
  model: Generator,
  params: Any,
  rows: Rows,
  keys: jax.Array,
  sampler: sampling.TokenSampler,
  i: jax.Array,
  count: int,
  replacement: bool,
) -> tuple[jax.Array, jax.Array, Rows]:
  runner = _runner(model, params, rows, sampler)
  arguments = runner, keys, sampler, i, rows.sequences, count, replacement
  tokens, log_probs, sequences = sampling.branch(model, params, *arguments)
  return tokens, log_probs, rows.replace(sequences=sequences)


@functools.partial(jax.jit, static_argnames=("num_ids", "length"))
def _take(rows: Rows, which: jax.Array, chosen: Any, num_ids: int, length: int) -> Rows:
  """Gathers rows; caches [rows or 2 rows, h, length, e] are cut or padded to `length` as ids are."""
  old = rows.sequences
  count, size = old.ids.shape

  def fit(x: jax.Array, axis: int, value: Any) -> jax.Array:
    x = jax.lax.slice_in_dim(x, 0, min(size, length), axis=axis)
    return jnp.pad(x, [(0, max(0, length - size) * (i == axis)) for i in range(x.ndim)], constant_values=value)

  halves = [len(x) // count for x in jax.tree.leaves(old.carried)][:1]
  everywhere = jnp.concatenate([which + half * count for half in range(*halves or (1,))])
  sequences = sampling.Sequences(
    fit(old.ids[which], 1, num_ids),
    fit(old.log_probs[which], 1, 0.0),
    old.done[which],
    jax.tree.map(lambda x: fit(x[everywhere], 2, 0), old.carried),
  )
  if chosen is not None:
    sequences = sampling.append(num_ids, sequences, *chosen)
  return rows.replace(sequences=sequences, owner=rows.owner[which])


@functools.partial(jax.jit, static_argnames="num_ids")
def _uniform(
  sequences: sampling.Sequences, keys: jax.Array, first: jax.Array, num_tokens: jax.Array, num_ids: int
) -> sampling.Sequences:
  place = jnp.arange(sequences.ids.shape[1], dtype=jnp.int32)
  draw = lambda key, i: jax.random.randint(jax.random.fold_in(key, i), (), 0, num_ids, jnp.int32)
  drawn = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, place)
  new = (first <= place) & (place < num_tokens)
  return sequences.replace(
    ids=jnp.where(new, drawn, sequences.ids), log_probs=jnp.where(new, -math.log(num_ids), sequences.log_probs)
  )
