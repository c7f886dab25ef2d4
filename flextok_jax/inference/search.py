"""Search over tokens at test time: candidates are scored by a verifier while they grow (arXiv 2604.15453).

A beam search extends every beam to the next of a few lengths, branches it into candidates, scores all candidates of a
prompt, and keeps the best. With lookahead, candidates are extended greedily before they are scored. Best-of-N draws
complete sequences and scores them once.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core.errors import quote
from flextok_jax.core.progress import track
from flextok_jax.inference import batches, conditions, priors, tokenizer, validation, verifiers
from flextok_jax.inference.priors import Prior, Rows, fold, take
from flextok_jax.inference.search_plan import Plan, Settings, make_plan, make_settings
from flextok_jax.models.ar import sampling
from flextok_jax.parallel import batching


@dataclasses.dataclass(frozen=True)
class Candidates:
  """What a verifier scores: n sequences, in any order, of one or several prompts.

  Attributes:
    ids: int32 [n, tokens], with lookahead of the extended sequences; the stop id from the end of a sequence on.
    images: their pictures, float32 [n, h, w, 3] in [-1, 1], all of a prompt decoded from the same noise; None for a
      verifier whose needs_images is False.
    prompts: texts [n], or None where there are none.
    labels: classes int [n], or None.
    which: int [n], the number of each one's prompt.
    log_probs: float32 [n], of all tokens under the guided logits, without those of a lookahead.
    step_log_probs: float32 [n], of the tokens of the present step alone.
  """

  ids: np.ndarray
  images: np.ndarray | None
  prompts: list[str] | None
  labels: np.ndarray | None
  which: np.ndarray
  log_probs: np.ndarray
  step_log_probs: np.ndarray


Verifier = Callable[[Candidates], Any]  # -> scores [n], larger is better


@dataclasses.dataclass(frozen=True)
class Step:
  """The beams that a step kept, best first: ids int32 [prompts, width, tokens], scores float64 [prompts, width]."""

  ids: np.ndarray
  scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
  """What a search found, best first.

  Attributes:
    ids: int32 [prompts, num_results, tokens]; the stop id from the end of a sequence on.
    images: float32 [prompts, num_results, h, w, 3] in [-1, 1], or None without a tokenizer.
    scores: float64 [prompts, num_results]; -inf where a prompt has fewer results.
    steps: what each step kept.
    decoded: number of pictures that were decoded for scores, per prompt.
  """

  ids: np.ndarray
  images: np.ndarray | None
  scores: np.ndarray
  steps: tuple[Step, ...]
  decoded: int


def search(
  prior: Prior,
  keys: jax.Array,
  verifier: Verifier,
  model: tokenizer.FlexTok | None,
  prompts: Sequence[str] | None,
  labels: np.ndarray | None,
  settings: Settings,
  progress: bool | None = False,
  size: tuple[int, int] | None = None,
) -> Result:
  """Searches for each prompt.

  Args:
    prior: of all prompts.
    keys: one for each prompt [p], on which its result depends, and on nothing else.
    verifier: scores candidates.
    model: decodes them; None: the verifier needs no images.
    prompts: texts [p] for the verifier, or None.
    labels: classes int [p] for the verifier, or None.
    settings: of the search.
    progress: whether to show a bar, see core.progress.Bar.
    size: (height, width) of the pictures; None: the model's image_size.

  Raises:
    ValueError: a setting out of range; scores of a wrong shape, or NaN; no tokenizer for a verifier of images; or a
      size that the model cannot decode.
  """
  plan = make_plan(prior, settings)
  if size is not None:
    if model is None:
      raise ValueError(f"size={quote(size)} has no effect without a tokenizer, which decodes pictures: leave it out")
    model.latent_shape_of(size)
  if model is None and needs_images(verifier):
    raise ValueError("this verifier looks at images: give tokenizer=..., which decodes them")
  count, local = len(keys), batches.local_mesh()
  mesh = local if local.size > 1 else None
  group = max(1, plan.batch_size // (plan.width * plan.candidates))
  group = batching.batch_rows(group, count, mesh)
  if mesh is not None:
    prior, model = prior.on(mesh), None if model is None else batching.replicate(model, mesh)
  facts = _Facts(prior, plan, verifier, model, prompts, labels, keys, mesh, size)
  found = []
  left = lambda first: min(group, count - first)
  for first in track(range(0, count, group), count, "searches", validation.progress(progress), size=left):
    # The last group is filled up with the last prompt, which is not scored again, to compile no other program.
    which = np.minimum(np.arange(first, first + group), count - 1)
    rows = left(first)
    found.append(jax.tree.map(lambda x: x[:rows], facts.search(which, rows)))  # noqa: B023 called at once
  ids, scores, *steps = jax.tree.map(lambda *x: np.concatenate(x), *found)
  images, (_, number) = None, ids.shape[:2]
  if model is not None:
    images = facts.decode(ids.reshape(count * number, -1), np.repeat(np.arange(count), number))
    images = images.reshape(count, number, *images.shape[1:])
  decoded = sum(int(step[2].max()) for step in steps) if needs_images(verifier) else 0
  return Result(ids, images, scores, tuple(Step(kept, best) for kept, best, _ in steps), decoded)


def needs_images(verifier: Any) -> bool:
  """Whether a verifier looks at images: its attribute needs_images, True if it has none."""
  return bool(getattr(verifier, "needs_images", True))


@dataclasses.dataclass(frozen=True)
class _Branches:
  """The candidates of a step: `candidates` of each beam, one after another.

  Attributes:
    parents: number of each one's beam [n].
    choice: the token by which they differ: its number in the sequence, ids [n] and log-probabilities [n].
    valid: which of them count, bool [n].
    keys: of the draws of each [n].
  """

  parents: np.ndarray
  choice: tuple[int, np.ndarray, np.ndarray]
  valid: np.ndarray
  keys: jax.Array


@dataclasses.dataclass(frozen=True)
class _Facts:
  """What all steps of a search share."""

  prior: Prior
  plan: Plan
  verifier: Verifier
  model: tokenizer.FlexTok | None
  prompts: Sequence[str] | None
  labels: np.ndarray | None
  keys: jax.Array
  mesh: Any
  size: tuple[int, int] | None

  def search(self, which: np.ndarray, real: int) -> tuple:
    """Searches for the prompts `which` int [p], together; only the first `real` of them are scored.

    Returns:
      ids [p, num_results, tokens] and scores [p, num_results]; then of each step ids [p, width, tokens] and scores
      [p, width] of the beams that it kept, and how many candidates were scored [p].
    """
    prior, plan = self.prior, self.plan
    count, width, most = len(which), plan.width, prior.num_tokens
    keys = self.keys[which]
    room = lambda tokens: sampling.padded_length(tokens, most)
    # All beams are copies of the empty one at first, of which the first counts.
    length = room(plan.counts[0])
    beams = take(prior, prior.start(which, length, self.mesh), np.repeat(np.arange(count), width), length)
    alive = (np.arange(width) == 0) & (np.arange(count) < real)[:, None]
    steps, done, possible = [], 0, 1
    for number, tokens in enumerate(plan.counts):
      last = number == len(plan.counts) - 1
      beams = take(prior, beams, np.arange(count * width), room(tokens))
      step_keys = fold(jnp.repeat(fold(keys, [number] * count), width), np.tile(np.arange(width), count))
      beams, branches = self._branch(beams, alive, step_keys, done, tokens)
      goal = plan.lookahead_to(number, most)
      candidates, ahead, ids, log_probs = self._complete(beams, branches, tokens, goal, last)

      # Score, and keep the best of each prompt.
      per_prompt = width * plan.candidates
      scores = self._score(ahead[:, :goal], log_probs, done, np.repeat(which, per_prompt), branches.valid)
      scores = scores.reshape(count, per_prompt)
      order = np.argsort(-scores, axis=1, kind="stable")
      kept = order[:, : max(plan.num_results, width) if last else width]
      possible = min(kept.shape[1], possible * plan.candidates)  # the others are copies that do not count
      rows = np.arange(count)[:, None] * per_prompt + kept
      best, ids = np.take_along_axis(scores, kept, 1), ids[rows]
      steps.append((ids[:, :possible], best[:, :possible], np.isfinite(scores).sum(1)))
      if not last:
        alive = np.isfinite(best)
        flat = rows.reshape(-1)
        if candidates is not None:
          beams = take(prior, candidates, flat, room(tokens))
        else:
          at, chosen, chances = branches.choice
          beams = take(prior, beams, branches.parents[flat], room(tokens), (at, chosen[flat], chances[flat]))
      done = tokens
    return ids[:, : plan.num_results], best[:, : plan.num_results], *steps

  def _branch(
    self, beams: Rows, alive: np.ndarray, keys: jax.Array, done: int, tokens: int
  ) -> tuple[Rows, "_Branches"]:
    """Branches beams of `done` tokens, at the first or at the last token of a step that ends with `tokens` tokens.

    Args:
      beams: all beams of all prompts.
      alive: which of them count, bool [p, width].
      keys: of the draws of each beam.
      done: see above, as for tokens.

    Returns:
      The beams, up to the token that differs, and their branches.
    """
    prior, plan = self.prior, self.plan
    at = done if plan.branch_first else tokens - 1
    if at > done:
      beams = prior.extend(beams, keys, done, at, plan.greedy)
    ended = np.asarray(beams.sequences.done)
    chosen, chances, beams = prior.branch(beams, keys, at, plan.candidates, plan.greedy, plan.replacement)
    alive = alive.reshape(-1, 1)
    valid = np.isfinite(chances) & alive
    valid[ended] = (np.arange(plan.candidates) == 0) & alive[ended]  # it has one continuation: none
    parents = np.repeat(np.arange(alive.size), plan.candidates)
    choice = at, np.asarray(chosen).reshape(-1), np.asarray(chances).reshape(-1)
    each = np.tile(np.arange(plan.candidates), alive.size)
    return beams, _Branches(parents, choice, valid.reshape(-1), fold(jnp.repeat(keys, plan.candidates), each))

  def _complete(
    self, beams: Rows, branches: "_Branches", tokens: int, goal: int, last: bool
  ) -> tuple[Rows | None, np.ndarray, np.ndarray, np.ndarray]:
    """Completes a step, and looks ahead to `goal` tokens.

    Returns:
      The rows of the candidates, or None where beams and branches suffice to continue; then ids as of _ahead.
    """
    prior, plan, keys = self.prior, self.plan, branches.keys
    at = branches.choice[0]
    if last or tokens == at + 1:
      return None, *self._ahead(beams, branches.parents, branches.choice, keys, at + 1, tokens, goal)
    length = sampling.padded_length(tokens, prior.num_tokens)
    candidates = take(prior, beams, branches.parents, length, branches.choice)
    candidates = prior.extend(candidates, keys, at + 1, tokens, plan.greedy)
    ids, log_probs = (np.asarray(x)[:, :tokens] for x in (candidates.sequences.ids, candidates.sequences.log_probs))
    return candidates, self._ahead(candidates, None, None, keys, tokens, tokens, goal)[0], ids, log_probs

  def _ahead(
    self, rows: Rows, parents: Any, choice: Any, keys: jax.Array, at: int, tokens: int, goal: int
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Extends candidates to `tokens`, and greedily to `goal` tokens, some rows at a time, without keeping their caches.

    Returns:
      ids [rows, goal], and ids and log-probabilities [rows, tokens] before the lookahead.
    """
    count = len(keys)
    if parents is None:
      parents = np.arange(count)
    if at >= tokens == goal:  # nothing to draw
      old = rows.sequences
      ids, log_probs = (np.asarray(x)[parents, :tokens] for x in (old.ids, old.log_probs))
      if choice is not None:
        open_rows = ~np.asarray(old.done)[parents]
        ids[open_rows, choice[0]] = np.asarray(choice[1])[open_rows]
        log_probs[open_rows, choice[0]] = np.asarray(choice[2])[open_rows]
      return ids, ids, log_probs
    found = []
    length, size = sampling.padded_length(goal, self.prior.num_tokens), min(self.plan.batch_size, count)
    for first in range(0, count, size):
      some = np.minimum(np.arange(first, first + size), count - 1)
      chosen = None if choice is None else (choice[0], *(np.asarray(x)[some] for x in choice[1:]))
      part = take(self.prior, rows, parents[some], length, chosen)
      if tokens > at:
        part = self.prior.extend(part, keys[some], at, tokens, self.plan.greedy)
      ids, log_probs = (np.asarray(x)[:, :tokens] for x in (part.sequences.ids, part.sequences.log_probs))
      if goal > tokens:
        part = self.prior.extend(part, keys[some], tokens, goal, True)
      found.append((np.asarray(part.sequences.ids)[:, :goal], ids, log_probs))
    ahead, ids, log_probs = (np.concatenate(x)[:count] for x in zip(*found))
    return ahead, ids, log_probs

  def _score(
    self, ids: np.ndarray, log_probs: np.ndarray, before: int, which: np.ndarray, valid: np.ndarray
  ) -> np.ndarray:
    """Returns the scores float64 [n] of candidates, -inf where they are not valid."""
    some = np.flatnonzero(valid)
    ids, log_probs, which = ids[some], log_probs[some], which[some]
    candidates = Candidates(
      ids=ids,
      images=self.decode(ids, which) if needs_images(self.verifier) else None,
      prompts=None if self.prompts is None else [self.prompts[i] for i in which],
      labels=None if self.labels is None else np.asarray(self.labels)[which],
      which=which,
      log_probs=log_probs.sum(1),
      step_log_probs=log_probs[:, before:].sum(1),
    )
    scores = np.asarray(self.verifier(candidates), np.float64)
    if scores.shape != which.shape or np.isnan(scores).any():
      raise ValueError(
        f"a verifier must return a score for each of {len(which)} candidates, got an array of shape "
        f"{list(scores.shape)}{' with NaN' if np.isnan(scores).any() else ''}"
      )
    every = np.full(len(valid), -np.inf)
    every[some] = np.maximum(scores, np.finfo(np.float64).min)
    return every

  def decode(self, ids: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Returns the pictures float32 [n, h, w, 3] of sequences [n, tokens] of the prompts `which` [n]."""
    assert self.model is not None
    return decode(self.model, ids, self.prior.stop_id, self.keys[which], self.plan.batch_size, self.size)


def decode(
  model: tokenizer.FlexTok,
  ids: np.ndarray,
  stop_id: int | None,
  keys: jax.Array,
  batch_size: int,
  size: tuple[int, int] | None = None,
) -> np.ndarray:
  """Returns the pictures float32 [n, h, w, 3] in [-1, 1] that a search shows its verifier.

  Args:
    model: the tokenizer.
    ids: int32 [n, tokens]; the stop id from the end of a sequence on.
    stop_id: of the generator; None without one.
    keys: of each sequence's prompt [n], from which its noise is drawn.
    batch_size: pictures at once.
    size: (height, width) of the pictures; None: the model's image_size.
  """
  noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(2**32 - 1))
  keep_k = np.full(len(ids), ids.shape[1]) if stop_id is None else (ids != stop_id).sum(1)
  ids = np.where(np.arange(ids.shape[1]) < keep_k[:, None], ids, 0)
  return batches.decode_rows(model, ids, keep_k.astype(np.int32), noise_keys, batch_size, size)


@dataclasses.dataclass(frozen=True)
class UniformPrior:
  """Searches for token ids without a generator: every code is equally likely, and the verifier alone decides."""

  tokenizer: tokenizer.FlexTok

  def search(
    self,
    key: jax.Array,
    verifier: Any,
    prompts: Sequence[str] | None = None,
    labels: Any = None,
    weights: str | None = None,
    references: Any = None,
    ensemble: str = "rank",
    progress: bool | None = False,
    size: tuple[int, int] | None = None,
    **settings: Any,
  ) -> Result:
    """See ARGenerator.search, of which it takes the settings; prompts and labels are for the verifier alone."""
    sizes = {
      name: len(x)
      for name, x in (("prompts", prompts), ("labels", labels), ("references", references))
      if x is not None
    }
    batch = validation.num_samples({**sizes, "key": len(key) if validation.typed_keys(key).ndim else None})
    prior = priors.Uniform(self.tokenizer.num_codes, self.tokenizer.num_registers)
    check = verifiers.make(verifier, weights=weights, references=references, ensemble=ensemble)
    texts = None if prompts is None else conditions.texts(prompts)
    numbers = None if labels is None else np.asarray(labels, np.int32)
    keys, chosen = validation.keys(key, batch), make_settings(settings)
    return search(prior, keys, check, self.tokenizer, texts, numbers, chosen, progress, size)
