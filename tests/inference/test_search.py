"""Search over tokens: against a plain beam over uncached logits; draws, ends, pictures, verifiers, bad input.

The public classes' own numbers: tests/models/test_golden_search.py.
"""

import jax
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

import flextok_jax
from flextok_jax.inference import batches, search, verifiers
from flextok_jax.inference import tokenizer as api
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from tests.inference.test_generator import KEY, LABELS, forced_log_probs, tiny
from tests.support.tiny import make_params, tiny_config

NUM_IDS, MOST = 24, 12
PLACES = np.random.default_rng(0).normal(size=(MOST, NUM_IDS + 1))  # +1: the stop id


def table(candidates):
  return sum(PLACES[i, ids] for i, ids in enumerate(candidates.ids.T))


table.needs_images = False


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Eight virtual devices would search for eight prompts."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  monkeypatch.setattr(batches, "local_mesh", lambda: mesh)


def plain_beam(gen, score, counts, width, candidates, first, lookahead=0, scale=2.0):
  """Greedy search for LABELS, prompt by prompt, with the whole prefix recomputed for each token."""

  def log_probs(prompt, ids):
    """Of the token after ids."""
    padded = np.zeros((3, len(ids) + 1), np.int32)
    padded[:, : len(ids)] = ids
    return forced_log_probs(gen, padded, scale)[prompt, -1]

  def grown(prompt, ids, length):
    while len(ids) < length:
      ids = [*ids, int(log_probs(prompt, ids).argmax())]
    return ids

  found = []
  for prompt in range(3):
    beams, done, steps = [[]], 0, []
    for count in counts:
      rows = []
      for beam in beams:
        start = grown(prompt, beam, done if first else count - 1)
        for token in np.argsort(-log_probs(prompt, start), kind="stable")[:candidates]:
          rows.append(grown(prompt, [*start, int(token)], count))
      extended = [grown(prompt, ids, min(count + lookahead, MOST)) for ids in rows]
      scores = score(np.array(extended))
      best = np.argsort(-scores, kind="stable")[:width]
      beams, done = [rows[i] for i in best], count
      steps.append((np.array(beams), scores[best]))
    found.append(steps)
  return found


@pytest.mark.parametrize(
  "branching, lookahead, batch_size", [("last", 0, 128), ("first", 0, 6), ("first", 2, 5), ("last", -1, 128)]
)
def test_against_a_plain_beam(branching, lookahead, batch_size):
  gen, settings = tiny("class"), dict(schedule=(1, 2, 5), beam_width=2, candidates=3)
  if lookahead:
    settings |= dict(algorithm="lookahead", lookahead=lookahead)
  result = gen.search(
    None, None, table, labels=LABELS, guidance_scale=2.0, greedy=True, branching=branching, batch_size=batch_size,
    **settings,
  )  # fmt: skip
  score = lambda ids: sum(PLACES[i, column] for i, column in enumerate(ids.T))
  ahead = MOST if lookahead < 0 else lookahead
  expected = plain_beam(gen, score, (1, 2, 5), 2, 3, branching == "first", ahead)
  for prompt, steps in enumerate(expected):
    for step, (ids, scores) in zip(result.steps, steps, strict=True):
      np.testing.assert_array_equal(step.ids[prompt], ids)
      np.testing.assert_allclose(step.scores[prompt], scores)
    np.testing.assert_array_equal(result.ids[prompt], steps[-1][0][:1])


def test_likelihoods_are_those_of_teacher_forcing():
  seen = []

  def note(candidates):
    seen.append(candidates)
    return candidates.log_probs

  note.needs_images = False
  gen = tiny("class")
  result = gen.search(KEY, None, note, labels=LABELS, guidance_scale=2.0, beam_width=2, candidates=2, schedule=(2, 6))
  forced = forced_log_probs(gen, result.ids[:, 0], 2.0)
  chosen = np.take_along_axis(forced, result.ids[:, 0, :, None], -1)[..., 0]
  np.testing.assert_allclose(result.scores[:, 0], chosen.sum(1), rtol=1e-4)
  for prompt in range(3):
    row = np.flatnonzero((seen[-1].ids == result.ids[prompt, 0]).all(1) & (seen[-1].which == prompt))[0]
    np.testing.assert_allclose(seen[-1].step_log_probs[row], chosen[prompt, 2:].sum(), rtol=1e-4)
  np.testing.assert_array_equal(seen[0].labels, np.repeat(LABELS, 2))


def test_a_prompt_depends_on_its_key_alone(monkeypatch):
  """Not on batch size, devices and neighbours; and the candidates of a beam differ at the first new token."""
  gen, seen = tiny("text_stop"), []

  def note(candidates):
    seen.append(candidates.ids)
    return table(candidates)

  note.needs_images = False
  prompts, keys = ["red", "blue", "ä"], jax.random.split(KEY, 3)
  settings = dict(verifier=note, guidance_scale=1.5, beam_width=2, candidates=3, schedule=(1, 3, 8), num_results=2)
  with monkeypatch.context() as patch:
    patch.setattr(batches, "local_mesh", lambda: sharding.make_mesh(devices=jax.devices()[:4]))
    together = gen.search(keys, prompts=prompts, batch_size=128, **settings)
  assert len(np.unique(seen[0].reshape(3, 3), axis=1)) == 3 and (np.diff(np.sort(seen[0].reshape(3, 3))) > 0).all()
  for i in range(3):
    alone = gen.search(keys[i : i + 1], prompts=prompts[i : i + 1], batch_size=1, **settings)
    np.testing.assert_array_equal(alone.ids[0], together.ids[i])
    np.testing.assert_allclose(alone.scores[0], together.scores[i])
  ended = together.ids == gen.stop_id
  assert ended.any() and (np.diff(ended.astype(int), axis=-1) >= 0).all()
  assert not (np.sum([s.ids[..., 0] == gen.stop_id for s in together.steps]))


def test_best_of_n_is_the_best_of_its_samples():
  seen = []

  def note(candidates):
    seen.append(candidates.ids)
    return table(candidates)

  note.needs_images = False
  settings = dict(algorithm="best_of_n", candidates=7, num_results=2, batch_size=4)
  result = tiny("class").search(KEY, verifier=note, labels=LABELS, **settings)
  ids = np.concatenate(seen)
  assert len(np.unique(ids, axis=0)) > 15
  scores = sum(PLACES[i, column] for i, column in enumerate(ids.T)).reshape(3, 7)
  np.testing.assert_allclose(result.scores, -np.sort(-scores)[:, :2])


@pytest.fixture(scope="module")
def tokenizer():
  """Of the codes of the tiny generators."""
  config = tiny_config(tokens=dict(num_registers=MOST, levels=(2, 3, 4), nested_dropout="uniform"))
  return api.FlexTok(make_params(make_stage(config)), FrozenConfigDict(config))


def test_pictures_have_the_noise_of_their_prompt(tokenizer):
  """Those that a verifier sees are those of detokenize; nothing is decoded where it does not look."""
  seen = []

  def brightness(candidates):
    seen.append(candidates)
    return candidates.images.mean((1, 2, 3))

  keys = jax.random.split(KEY, 2)
  settings = dict(beam_width=2, candidates=2, schedule=(1, 4), num_results=2)
  result = tiny("class").search(keys, tokenizer, brightness, labels=LABELS[:2], **settings)
  assert result.decoded == 2 + 4 and [len(c.ids) for c in seen] == [4, 8]
  noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(2**32 - 1))
  pictures = tokenizer.detokenize(seen[1].ids, key=noise_keys[seen[1].which])
  np.testing.assert_allclose(seen[1].images, np.clip(pictures, -1, 1), atol=1e-5)
  expected = tokenizer.detokenize(result.ids.reshape(4, -1), key=noise_keys[np.array([0, 0, 1, 1])])
  np.testing.assert_allclose(result.images.reshape(4, *expected.shape[1:]), np.clip(expected, -1, 1), atol=1e-5)
  np.testing.assert_allclose(result.scores, result.images.mean((2, 3, 4)), atol=1e-5)


def test_search_as_an_encoder(tokenizer):
  """Without a generator, tokens whose picture is near to a reference; more candidates come nearer."""
  references = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  prior = flextok_jax.UniformPrior(tokenizer)
  settings = dict(verifier="psnr", references=references, beam_width=2, schedule=(1, 2))
  few, many = (prior.search(KEY, candidates=count, **settings).scores[:, 0] for count in (2, 16))
  assert (many >= few).all() and many.sum() > few.sum()
  with pytest.raises(ValueError, match="greedy=True has no meaning without a generator"):
    prior.search(KEY, greedy=True, **settings)


def test_ensembles():
  of = lambda *scores: lambda candidates: np.array(scores)
  candidates = search.Candidates(
    ids=np.zeros((4, 1), int), images=None, prompts=None, labels=None, which=np.array([0, 0, 0, 1]),
    log_probs=np.arange(4.0), step_log_probs=np.zeros(4),
  )  # fmt: skip
  a, b = of(1.0, 3.0, 2.0, 9.0), of(10.0, 0.0, 5.0, -9.0)
  np.testing.assert_array_equal(verifiers.make([a, b])(candidates), [-2, -2, -2, 0])
  np.testing.assert_array_equal(verifiers.make({a: 1.0, b: 3.0})(candidates), [-2, -6, -4, 0])
  np.testing.assert_allclose(verifiers.make({a: 1.0, b: 3.0}, ensemble="weighted")(candidates), [3, 1, 2, 0])
  assert not verifiers.make(["likelihood", "step_likelihood"]).needs_images
  np.testing.assert_array_equal(verifiers.make("likelihood")(candidates), candidates.log_probs)


@pytest.mark.parametrize(
  "given, words",
  [
    (dict(algorithm="mcts"), "algorithm='mcts' must be one of beam, lookahead, best_of_n"),
    (dict(schedule="cubic"), "schedule='cubic' must be one of geometric, linear, fixed, or token counts"),
    (dict(schedule=(3, 2)), r"schedule=\(3, 2\) must be ascending token counts"),
    (dict(schedule=(3, 13)), "schedule=13 must be a whole number from 1 to 12"),
    (dict(tokens_per_step=2), "tokens_per_step=2 is for schedule='linear'"),
    (dict(candidates=25), "candidates=25 must be a whole number from 1 to 24"),
    (dict(num_results=6), "num_results=6 is more than beam_width=5"),
    (dict(algorithm="lookahead", lookahead=0), "lookahead=0 looks at nothing"),
    (dict(greedy=True, replacement=True), "replacement=True has no effect when greedy"),
    (dict(algorithm="best_of_n", greedy=True), "best_of_n draws its samples"),
    (dict(beams=3), "search has no setting 'beams': its settings are algorithm, "),
    (dict(verifier="beauty"), "verifier='beauty' must be one of clip, likelihood, "),
    (dict(verifier="clip"), "metric 'clip' needs weights=DIR, a folder with clip"),
    (dict(verifier="psnr"), "verifier 'psnr' compares with an image for each prompt: give references"),
    (dict(verifier=len), "this verifier looks at images: give tokenizer="),
    (dict(key=None), "tokens are drawn at random: pass key="),
  ],
)
def test_bad_input(given, words):
  with pytest.raises(ValueError, match=words) as error:
    tiny("class").search(**{**dict(key=KEY, verifier=table, labels=LABELS), **given})
  assert "\n" not in str(error.value)


def test_bad_scores(tokenizer):
  for scores, words in ((np.zeros(3), r"array of shape \[3\]"), (np.full(6, np.nan), "with NaN")):
    verifier = lambda candidates, scores=scores: scores
    with pytest.raises(ValueError, match=f"a verifier must return a score for each of 6 candidates.*{words}"):
      tiny("class").search(KEY, tokenizer, verifier, labels=LABELS, candidates=2, schedule=(1,))
