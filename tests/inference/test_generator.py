"""Token generation: cached against recomputed against teacher forcing; stopping, keys, files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np
import pytest

import flextok_jax
from flextok_jax.config import with_fields
from flextok_jax.inference import drawing
from flextok_jax.inference import generator as generation
from flextok_jax.models.ar import sampling as ar_sampling
from flextok_jax.ops import sampling
from flextok_jax.stages.ar import ARStage, make_generator
from tests.support import numpy_ar

KEY = jax.random.key(3)
LABELS = np.array([0, 4, -1])
PROMPTS = ["red", "a blue disc", "ä"]  # the second is too long and is truncated
DRAWS = dict(temperature=1.2, top_k=9, top_p=0.95)
MODELS = {  # few models, always called with the same arguments: each program is compiled once
  "class": dict(bias=True),
  "text": dict(condition="text", depth=1),
  "none": dict(condition="none", depth=1),
  "class_stop": dict(bias=True, depth=1, stop=True, qk_norm="layernorm", pos_embed="sincos1d", head_layernorm=True),
  "text_stop": dict(condition="text", bias=True, stop=True, norm="layernorm", readout_multiplier=0.5),
}


def close(actual, desired, atol=1e-4):
  np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=atol)


def with_stop_bias(gen, bias):
  """Returns the generator with another bias of the stop logit."""
  readout = gen.params["ar"]["readout"]
  readout = {**readout, "bias": readout["bias"].at[-1].set(bias)}
  return dataclasses.replace(gen, params={**gen.params, "ar": {**gen.params["ar"], "readout": readout}})


@functools.cache
def tiny(name):
  gen = numpy_ar.tiny_generator(**MODELS[name])
  return with_stop_bias(gen, 2.0) if gen.stop_id else gen  # most samples stop before the end


def condition(gen, rows=slice(None)):
  """Returns the arguments of three samples, or of some of them."""
  if gen.num_classes:
    return dict(labels=LABELS[rows])
  if gen.config.ar.condition == "text":
    return dict(prompts=[PROMPTS[i] for i in np.arange(3)[rows]])
  return dict(num_samples=len(LABELS[rows]))


def sample(gen, key=KEY, rows=slice(None), **kwargs):
  ids, log_probs = gen.generate(key, **condition(gen, rows), return_log_probs=True, **kwargs)
  return np.asarray(ids), np.asarray(log_probs)


def prefix_of(count):
  return np.random.default_rng(5).integers(0, 24, (3, count), np.int32)


def forced_log_probs(gen, ids, guidance_scale=1.0):
  """Log-probabilities [b, n, v] of all tokens at each position of ids, by teacher forcing, with guidance."""
  read = np.minimum(ids, gen.num_ids - 1)
  given = condition(gen)
  if "prompts" in given:
    features, lengths = gen.encode_text(given["prompts"])
    conditional = gen.logits(read, None, features, lengths)
  else:
    conditional = gen.logits(read, given.get("labels"))
  logits = np.float64(conditional)
  if np.any(guidance_scale != 1):
    unconditional = np.float64(gen.logits(read))
    logits = unconditional + guidance_scale * (logits - unconditional)
  if gen.stop_id:
    logits[:, 0, -1] = -np.inf
  return numpy_ar.log_softmax(logits)


def assert_log_probs(gen, ids, log_probs, given, guidance_scale=1.0):
  """Asserts that they equal teacher forcing, and are 0 in the prefix and after a stop."""
  forced = forced_log_probs(gen, ids, guidance_scale)
  expected = np.take_along_axis(forced, ids[..., None], -1)[..., 0]
  expected[:, :given] = 0
  if gen.stop_id:
    expected[:, 1:][ids[:, :-1] == gen.stop_id] = 0
  close(log_probs, expected)
  return forced


# Cached, recomputed, teacher forcing.


@pytest.mark.parametrize("name, given", [("class", 0), ("class", 5), ("text_stop", 1)])
def test_greedy_equals_teacher_forcing(name, given):
  """Cached and recomputed generation take teacher forcing's most likely token at each step, with guidance."""
  gen = tiny(name)
  kwargs = dict(prefix=prefix_of(given), greedy=True, guidance_scale=2.0)
  ids, log_probs = sample(gen, None, **kwargs)
  again = sample(gen, None, **kwargs, fast=False)
  np.testing.assert_array_equal(again[0], ids)
  close(again[1], log_probs)
  np.testing.assert_array_equal(ids[:, :given], prefix_of(given))
  forced = assert_log_probs(gen, ids, log_probs, given, 2.0)
  stopped = np.cumsum(ids == 24, 1) > 1
  np.testing.assert_array_equal(np.where(stopped, 24, forced.argmax(-1))[:, given:], ids[:, given:])


def test_schedules_of_guidance_and_temperature():
  """Numbers of each token: the greedy choice follows the scale; a constant function is the number."""
  gen, scale = tiny("class"), lambda i: 1.0 + i % 3
  ids, log_probs = sample(gen, None, greedy=True, guidance_scale=scale)
  scales = np.array([scale(i) for i in range(12)])[:, None]
  forced = assert_log_probs(gen, ids, log_probs, 0, scales)
  np.testing.assert_array_equal(forced.argmax(-1), ids)
  drawn = [sample(gen, guidance_scale=2.0, temperature=x)[0] for x in (1.3, lambda i: 1.3, lambda i: 1.3 + i)]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert (drawn[0][:, 0] == drawn[2][:, 0]).all() and (drawn[0] != drawn[2]).any()
  with pytest.raises(ValueError, match=r"temperature\(1\)=0 must be a number"):
    gen.generate(KEY, labels=LABELS, temperature=lambda i: 1 - i)


@pytest.mark.parametrize("name, given", [("text", 3), ("class_stop", 11)])
def test_sampling_equals_teacher_forcing(name, given):
  """The same for random samples, without guidance."""
  gen = tiny(name)
  kwargs = dict(prefix=prefix_of(given), **DRAWS)
  ids, log_probs = sample(gen, **kwargs)
  again = sample(gen, **kwargs, fast=False)
  np.testing.assert_array_equal(again[0], ids)
  close(again[1], log_probs)
  np.testing.assert_array_equal(ids[:, :given], prefix_of(given))
  assert_log_probs(gen, ids, log_probs, given)
  assert (ids[:, given:] != np.asarray(gen.generate(jax.random.key(4), **condition(gen), **kwargs))[:, given:]).any()


def test_more_tokens_than_one_chunk_of_the_plain_path():
  length = ar_sampling.SLOW_CHUNK + 8
  gen = numpy_ar.tiny_generator(condition="none", depth=1, num_tokens=length)
  prefix = np.arange(24)[None]
  (ids, log_probs), again = (sample(gen, prefix=prefix, fast=fast) for fast in (True, False))
  np.testing.assert_array_equal(ids[:, :24], np.repeat(prefix, 3, 0))  # one row is broadcast to all
  assert ids.shape == (3, length)
  assert_log_probs(gen, ids, log_probs, 24)
  np.testing.assert_array_equal(again[0], ids)
  close(again[1], log_probs)


# Properties.


def test_samples_are_independent_of_their_neighbours():
  """They do not depend on the batch size either: each has its own key."""
  gen, keys = tiny("class_stop"), jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(3))
  ids, log_probs = sample(gen)
  order = np.array([2, 0, 1])
  moved = sample(gen, keys[order], order)
  np.testing.assert_array_equal(moved[0], ids[order])
  close(moved[1], log_probs[order], 1e-5)
  for row in np.arange(3)[:, None]:
    alone = sample(gen, keys[row], row)
    np.testing.assert_array_equal(alone[0], ids[row])
    close(alone[1], log_probs[row], 1e-5)


def test_texts_are_independent_of_their_neighbours():
  gen, keys, order = tiny("text"), jax.random.split(KEY, 3), np.array([2, 0, 1])
  ids = sample(gen, keys, guidance_scale=1.5)[0]
  np.testing.assert_array_equal(sample(gen, keys[order], order, guidance_scale=1.5)[0], ids[order])


def test_guidance_scales():
  """Scale 1 is the conditional model, 0 the unconditional one; without a class every scale is unconditional."""
  gen = tiny("class")
  conditional = sample(gen)
  guided = sample(gen, guidance_scale=1 + 1e-12)  # 1 in float32, but runs the program with guidance
  np.testing.assert_array_equal(guided[0], conditional[0])
  close(guided[1], conditional[1])
  unconditional = gen.generate(KEY, num_samples=3)
  np.testing.assert_array_equal(gen.generate(KEY, labels=[-1, -1, -1]), unconditional)
  np.testing.assert_array_equal(sample(gen, guidance_scale=0.0)[0], unconditional)
  np.testing.assert_array_equal(gen.generate(KEY, labels=np.full(3, -1), guidance_scale=4.0), unconditional)
  np.testing.assert_array_equal(gen.generate(KEY, labels=-1, num_samples=3), unconditional)
  assert (conditional[0] != unconditional).any(1)[:2].all()


def test_no_text_equals_the_empty_text():
  gen = tiny("text")
  features, lengths = gen.encode_text([""])
  assert lengths.tolist() == [1] and features.shape == (1, 10, 16)
  empty = dict(text_embeddings=np.repeat(features, 3, 0), text_lengths=np.repeat(lengths, 3))
  unconditional = gen.generate(KEY, num_samples=3)
  np.testing.assert_array_equal(gen.generate(KEY, **empty), unconditional)
  np.testing.assert_array_equal(sample(gen, guidance_scale=0.0)[0], unconditional)
  ids = np.asarray(unconditional)
  close(gen.logits(ids), gen.logits(ids, None, *empty.values()), 1e-6)


def test_text_features_replace_prompts():
  """Also with another length than the features of the empty text."""
  gen = tiny("text")
  features, lengths = gen.encode_text(PROMPTS)
  assert lengths.tolist() == [4, 10, 3]
  null, _ = gen.encode_text([""])
  given = dict(text_embeddings=features, text_lengths=lengths, guidance_scale=1.5)
  ids = sample(gen, guidance_scale=1.5)[0]
  np.testing.assert_array_equal(gen.generate(KEY, **given), ids)
  cut = dict(null_text_embeddings=null[:, :1], null_text_lengths=[1])
  np.testing.assert_array_equal(gen.generate(KEY, **given, **cut), ids)


def test_fewer_tokens_are_a_prefix():
  gen = tiny("class_stop")
  ids, log_probs = sample(gen)
  for num_tokens in (1, 5, 8, 11):
    fewer = sample(gen, num_tokens=num_tokens)
    np.testing.assert_array_equal(fewer[0], ids[:, :num_tokens])
    close(fewer[1], log_probs[:, :num_tokens], 1e-6)


@pytest.mark.parametrize("name", ["text", "class_stop"])
def test_log_probs_sum_to_the_loss(name):
  """For samples with lengths as in training; except the first token, whose loss does not exclude the stop."""
  gen = tiny(name)
  ids, log_probs = sample(gen, temperature=0.9)
  trimmed = gen.trim(ids)
  batch = dict(token_ids=np.where(ids < 24, ids, 0), length=np.array([len(row) for row in trimmed]))
  given = condition(gen)
  batch["label"] = given.get("labels", np.full(3, -1))
  if "prompts" in given:
    batch["text_features"], batch["text_lengths"] = gen.encode_text(given["prompts"])
  stage = ARStage(gen.config)
  losses, counts = (np.asarray(x) for x in jax.jit(stage.token_losses)(gen.params, batch))
  close(log_probs[:, 1:].sum(1), -(losses * counts)[:, 1:].sum(1))
  if not gen.stop_id:
    close(log_probs[:, 0], -losses[:, 0])


# Stopping.


def test_stop():
  """After a stop all ids are the stop id; its log-probability is at its position and zeros follow."""
  gen = tiny("class_stop")
  assert (gen.stop_id, gen.num_ids) == (24, 24)
  runs = [sample(gen, jax.random.key(seed)) for seed in range(20)]
  ids, log_probs = (np.concatenate(x) for x in zip(*runs))
  trimmed = gen.trim(ids)
  lengths = np.array([len(row) for row in trimmed])
  assert lengths.min() >= 1 and len(set(lengths)) > 5 and (lengths == 12).any()
  for row, kept, probs in zip(ids, trimmed, log_probs):
    np.testing.assert_array_equal(row[: len(kept)], kept)
    assert kept.dtype == np.int32 and (kept < 24).all() and (row[len(kept) :] == 24).all()
    assert (probs[: len(kept) + 1] < 0).all() and not probs[len(kept) + 1 :].any()


def test_stop_is_never_the_first_token():
  """Even if all samples stop at once; after a prefix it may be the first token that is drawn."""
  gen = with_stop_bias(tiny("class_stop"), 50.0)
  ids, log_probs = sample(gen)
  assert (ids[:, 0] < 24).all() and (ids[:, 1:] == 24).all()
  assert (log_probs[:, 0] < -1e-3).all() and not log_probs[:, 2:].any()
  close(log_probs[:, 1], np.zeros(3))
  for fast in (True, False):
    ids, _ = sample(gen, prefix=prefix_of(11), **DRAWS, fast=fast)
    np.testing.assert_array_equal(ids, np.pad(prefix_of(11), ((0, 0), (0, 1)), constant_values=24))
  assert [len(row) for row in gen.trim(ids)] == [11, 11, 11]


def test_generation_ends_when_all_have_stopped(monkeypatch):
  calls, draw = [], sampling.sample

  def counted(keys, logits):
    jax.debug.callback(lambda: calls.append(1))
    return draw(keys, logits)

  monkeypatch.setattr(sampling, "sample", counted)

  @jax.jit
  def run(gen):
    keys, prefix = jax.random.split(KEY, 3), jnp.zeros((3, 0), jnp.int32)
    model = make_generator(gen.config)
    arguments = keys, jnp.asarray(LABELS), None, None, prefix, 8
    return ar_sampling.generate(model, gen.params, *arguments, ar_sampling.TokenSampler(), length=8)[0]

  for bias, steps in ((50.0, 2), (-50.0, 8)):
    calls.clear()
    ids = np.asarray(run(with_stop_bias(tiny("class_stop"), bias)))
    jax.effects_barrier()
    assert len(calls) == steps
    assert ((ids == 24).sum(1) == 8 - min(steps, 8) + (steps == 2)).all()


@pytest.mark.parametrize("name", ["class", "text_stop"])
def test_a_stream_draws_what_generate_draws(name):
  """Token by token, with guidance, until all sequences have ended."""
  gen = tiny(name)
  given = {**DRAWS, "guidance_scale": 1.5}
  whole = np.asarray(gen.generate(KEY, **condition(gen), **given))
  steps = list(gen.stream(KEY, **condition(gen), **given))
  assert [step.shape[1] for step in steps] == list(range(1, len(steps) + 1))
  ended = (whole == gen.num_ids).any(1)
  assert len(steps) == (1 + (whole == gen.num_ids).argmax(1).max() if ended.all() else gen.num_tokens)
  for step in steps:
    np.testing.assert_array_equal(step, whole[:, : step.shape[1]])
  assert next(gen.stream(None, **condition(gen), greedy=True)).shape == (3, 1)
  with pytest.raises(ValueError, match="num_tokens=99"):
    next(gen.stream(KEY, num_tokens=99))


def test_model_without_stop():
  gen = tiny("class")
  assert gen.stop_id is None and gen.logits(np.zeros((1, 3), int)).shape == (1, 3, 24)
  ids = sample(gen)[0]
  assert ids.shape == (3, 12) and (ids < 24).all()
  assert [row.tolist() for row in gen.trim(ids)] == ids.tolist()


# Keys, programs, files.


def test_a_generator_is_a_jit_argument():
  """As an argument of a compiled function, with traced arguments."""
  gen, kwargs = tiny("class"), dict(guidance_scale=2.0, greedy=True, return_log_probs=True)
  draw = lambda gen, key, labels, prefix: gen.generate(key, labels=labels, prefix=prefix, **kwargs)
  ids, log_probs = jax.jit(draw)(gen, KEY, jnp.asarray(LABELS), prefix_of(5))
  expected = draw(gen, KEY, LABELS, prefix_of(5))
  np.testing.assert_array_equal(ids, expected[0])
  close(log_probs, expected[1])


@pytest.mark.parametrize("batch", [2, 3])
def test_legacy_prng_keys(batch):
  """The key of jax.random.PRNGKey is an array of two numbers, also when there are two samples."""
  gen, labels = tiny("class"), LABELS[:batch]
  ids = gen.generate(jax.random.PRNGKey(3), labels=labels)
  np.testing.assert_array_equal(ids, gen.generate(jax.random.key(3), labels=labels))


@pytest.mark.parametrize("name", ["class_stop", "text_stop"])
def test_save_and_load(name, tmp_path):
  gen = tiny(name)
  gen.save(tmp_path / "gen")
  loaded = flextok_jax.load_ar(tmp_path / "gen")
  assert loaded.config == gen.config and loaded.stop_id == gen.stop_id
  jax.tree.map(np.testing.assert_array_equal, loaded.params, gen.params)
  half = flextok_jax.load_ar(tmp_path / "gen" / "weights.safetensors", "bfloat16")
  assert half.config.dtype == "bfloat16" and all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(half.params))
  jax.tree.map(lambda a, b: close(a.astype(jnp.float32), b, 1e-2 * np.abs(b).max()), half.params, gen.params)


def test_bfloat16():
  """Logits are close to float32, and so are log-probabilities of the drawn tokens; with and without the cache."""
  gen = tiny("none")
  config = numpy_ar.tiny(**MODELS["none"])
  config.dtype = "bfloat16"
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gen.params)
  half = generation.ARGenerator(params, type(gen.config)(config))
  ids, log_probs = sample(half)
  forced = np.take_along_axis(forced_log_probs(half, ids), ids[..., None], -1)[..., 0]
  exact = np.take_along_axis(forced_log_probs(gen, ids), ids[..., None], -1)[..., 0]
  assert log_probs.dtype == np.float32
  assert np.abs(log_probs - forced).max() < 0.1 and np.abs(log_probs - exact).max() < 0.3


# In batches, and by names.


@pytest.mark.parametrize("name", ["class_stop", "text"])
def test_batches_of_any_size_draw_the_same_samples(name, capsys):
  gen = tiny(name)
  given = condition(gen) | dict(temperature=1.2, guidance_scale=2.0)
  once, log_probs = gen.generate(KEY, **given, return_log_probs=True)
  before = drawing.generate._cache_size()
  for batch_size in (2, 3):
    ids, sums = gen.generate(KEY, **given, return_log_probs=True, batch_size=batch_size, progress=batch_size == 2)
    np.testing.assert_array_equal(ids, once)
    close(sums, log_probs)
  assert drawing.generate._cache_size() == before + 1  # the batch that is not full is padded
  assert "samples drawn: 100%" in capsys.readouterr().err
  kept = prefix_of(2)
  ids = gen.generate(KEY, **given, prefix=kept[:1], batch_size=2)
  np.testing.assert_array_equal(ids, gen.generate(KEY, **given, prefix=kept[:1]))


def test_classes_by_name():
  gen = tiny("class")
  named = with_fields(ConfigDict(gen.config), {"ar.class_names": ("disc", "ring")})
  gen = dataclasses.replace(gen, config=FrozenConfigDict(named))
  ids = np.array([[1, 2], [3, 4]])
  np.testing.assert_array_equal(gen.logits(ids, labels=["ring", "disc"]), gen.logits(ids, labels=[1, 0]))
  np.testing.assert_array_equal(gen.generate(KEY, "ring", num_samples=2), gen.generate(KEY, [1, 1]))
  np.testing.assert_array_equal(gen.generate(KEY, ["ring", 3]), gen.generate(KEY, [1, 3]))
  with pytest.raises(ValueError, match="no class named 'star': its classes are 'disc, ring'"):
    gen.generate(KEY, ["ring", "star"])
