"""Bad arguments of the generator: one-line errors that contain the value."""

import functools
import math

import jax
import numpy as np
import pytest

import flextok_jax
from flextok_jax.inference import conditions, validation
from flextok_jax.models.ar.sampling import TokenSampler
from flextok_jax.weights import loading, saving
from tests.support import numpy_ar

KEY = jax.random.key(0)


@functools.cache
def tiny(condition):
  return numpy_ar.tiny_generator(condition=condition, depth=1)


BAD = {
  "class_too_large": ("class", dict(labels=[1, 5]), "class 5 is out of range: classes are 0 to 4"),
  "class_too_small": ("class", dict(labels=[-2, 1]), "class -2 is out of range"),
  "class_float": ("class", dict(labels=[0.5]), r"labels must be whole numbers.*0\.5"),
  "class_shape": ("class", dict(labels=[[1, 2]]), "labels must be whole numbers, one for each of 1"),
  "no_classes": ("text", dict(labels=[1]), "condition is 'text': it takes no labels"),
  "class_count": ("class", dict(labels=[1, 2], num_samples=3), "num_samples says 3, labels says 2"),
  "no_samples": ("class", dict(labels=[]), "labels is empty"),
  "num_samples": ("class", dict(num_samples=0), "num_samples"),
  "batch_size": ("class", dict(batch_size=0), "batch_size"),
  "prompts_of_class": ("class", dict(prompts=["red"]), "condition is 'class': it takes no prompts"),
  "text_of_class": ("class", dict(text_embeddings=np.zeros((1, 4, 16))), "condition is 'class': it takes no text"),
  "prompt_empty": ("text", dict(prompts=["red", " "]), "prompt 1 is empty"),
  "prompt_alone": ("text", dict(prompts="red"), "prompts must be a list of texts, got 'red'"),
  "prompt_number": ("text", dict(prompts=["red", 7]), r"prompts must be a list of texts, got \['red', 7\]"),
  "prompts_none": ("text", dict(prompts=[]), "prompts is empty"),
  "prompts_twice": ("text", dict(prompts=["red"], text_embeddings=np.zeros((1, 4, 16))), "both given"),
  "text_shape": ("text", dict(text_embeddings=np.zeros((2, 4, 8))), r"text_embeddings .*\[2, t, 16\], got \[2, 4, 8\]"),
  "text_rank": ("text", dict(text_embeddings=np.zeros((4, 16))), r"text_embeddings .* got \[4, 16\]"),
  "text_lengths": (
    "text",
    dict(text_embeddings=np.zeros((2, 4, 16)), text_lengths=[1, 5]),
    "text_lengths must be 2 whole .* to 4",
  ),
  "text_lengths_zero": ("text", dict(text_embeddings=np.zeros((1, 4, 16)), text_lengths=[0]), "text_lengths"),
  "text_lengths_count": ("text", dict(text_embeddings=np.zeros((2, 4, 16)), text_lengths=[1]), "text_lengths"),
  "null_text": (
    "text",
    dict(prompts=["red"], guidance_scale=2.0, null_text_embeddings=np.zeros((2, 4, 16))),
    r"null_text_embeddings must have shape \[1 or 1, t, 16\], got \[2, 4, 16\]",
  ),
  "null_text_width": (
    "text",
    dict(prompts=["red"], guidance_scale=2.0, null_text_embeddings=np.zeros((1, 4, 8))),
    r"got \[1, 4, 8\]",
  ),
  "guidance_of_none": ("none", dict(guidance_scale=2.0), "guidance_scale=2.0 needs a condition"),
  "guidance_nan": ("class", dict(guidance_scale=math.nan), "guidance_scale=nan"),
  "temperature_zero": (
    "class",
    dict(temperature=0.0),
    r"temperature=0.0 must be a number from 1e-06 to 1e\+06; greedy=True",
  ),
  "temperature_negative": ("class", dict(temperature=-1.0), "temperature=-1.0"),
  "temperature_nan": ("class", dict(temperature=math.nan), "temperature=nan"),
  "top_k_negative": ("class", dict(top_k=-1), "top_k=-1"),
  "top_k_large": ("class", dict(top_k=25), "top_k=25 .* 24"),
  "top_k_float": ("class", dict(top_k=2.5), "top_k=2.5"),
  "top_p_large": ("class", dict(top_p=1.5), "top_p=1.5"),
  "top_p_negative": ("class", dict(top_p=-0.1), "top_p=-0.1"),
  "top_p_nan": ("class", dict(top_p=math.nan), "top_p=nan"),
  "num_tokens_many": ("class", dict(num_tokens=13), "num_tokens=13 .* 12"),
  "num_tokens_zero": ("class", dict(num_tokens=0), "num_tokens=0"),
  "num_tokens_float": ("class", dict(num_tokens=4.0), "num_tokens=4.0"),
  "prefix_long": ("class", dict(prefix=np.zeros((1, 5), int), num_tokens=5), "prefix of 5 .* num_tokens=5"),
  "prefix_longer": ("class", dict(prefix=np.zeros((1, 13), int)), r"prefix .* at most 12, got int64 \[1, 13\]"),
  "prefix_rank": ("class", dict(prefix=[1, 2]), r"prefix must be integers \[b, n\].*\[2\]"),
  "prefix_float": ("class", dict(prefix=[[1.0]]), "prefix must be integers .* float64"),
  "prefix_id": ("class", dict(prefix=[[1, 24]]), "token id 24 in prefix is out of range: ids are 0 to 23"),
  "prefix_negative": ("class", dict(prefix=[[1, -3]]), "token id -3 in prefix"),
  "prefix_count": ("class", dict(prefix=np.zeros((2, 3), int), labels=[1, 2, 3]), "prefix says 2, labels says 3"),
  "no_key": ("class", dict(key=None), "pass key=jax.random.key"),
  "keys": ("class", dict(key=jax.random.split(KEY, 2), labels=[1, 2, 3]), "labels says 3, key says 2"),
  "key_number": ("class", dict(key=3.5), r"key must be a key like jax.random.key\(seed\), or a seed, got 3.5"),
  "key_list": ("class", dict(key=[0, 1]), "key must be a key"),
  "key_shape": ("class", dict(key=np.zeros(3, np.uint32)), "key must be a key"),
  "class_ragged": ("class", dict(labels=[1, [2]]), r"labels=\[1, \[2\]\] must be an array of numbers"),
  "class_name": ("class", dict(labels="dog"), "no class named 'dog': it has no names of classes: give numbers"),
  "class_wraps": ("class", dict(labels=[2**32 + 1]), "class 4294967297 is out of range"),
  "batch_size_name": ("class", dict(batch_size="two"), "batch_size='two' must be a whole number"),
  "batch_size_float": ("class", dict(batch_size=2.5), "batch_size=2.5 must be a whole number"),
  "prompts_number": ("text", dict(prompts=5), "prompts must be a list of texts, got 5"),
  "prompts_mapping": ("text", dict(prompts={"red": 1}), "prompts must be a list of texts"),
  "prompt_surrogate": ("text", dict(prompts=["\ud800"]), "prompt 0 is no valid text"),
  "text_nan": ("text", dict(text_embeddings=np.full((1, 4, 16), np.nan)), "text_embeddings must be finite"),
  "text_inf": ("text", dict(text_embeddings=jax.numpy.full((1, 4, 16), np.inf)), "text_embeddings must be finite"),
  "text_name": ("text", dict(text_embeddings="red"), "text_embeddings='red' must be an array of numbers"),
  "text_lengths_name": ("text", dict(text_embeddings=np.zeros((1, 4, 16)), text_lengths="a"), "text_lengths='a' must"),
  "guidance_negative": ("class", dict(guidance_scale=-1.0), "guidance_scale=-1.0 must be a number from 0"),
  "guidance_huge": ("class", dict(guidance_scale=1e39), r"guidance_scale=1e\+39 must be a number"),
  "guidance_name": ("class", dict(guidance_scale="a"), "guidance_scale='a' must be a number"),
  "temperature_tiny": ("class", dict(temperature=1e-38), "temperature=1e-38 must be a number from 1e-06"),
  "temperature_huge": ("class", dict(temperature=1e39), r"temperature=1e\+39"),
  "temperature_name": ("class", dict(temperature="hot"), "temperature='hot'"),
  "temperature_list": ("class", dict(temperature=[1.0]), r"temperature=\[1.0\]"),
  "temperature_bool": ("class", dict(temperature=True), "temperature=True"),
  "top_k_bool": ("class", dict(top_k=True), "top_k=True"),
  "top_p_name": ("class", dict(top_p="most"), "top_p='most'"),
  "greedy": ("class", dict(greedy="no"), "greedy='no' must be True or False"),
  "fast": ("class", dict(fast=None), "fast=None must be True or False"),
  "prefix_ragged": ("class", dict(prefix=[[1], [2, 3]]), "prefix=.* must be an array of numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
  name, kwargs, message = BAD[case]
  with pytest.raises(ValueError, match=message) as e:
    tiny(name).generate(**{"key": KEY, **kwargs})
  assert "\n" not in str(e.value)


BAD_LOGITS = {
  "rank": (dict(ids=[1, 2]), r"ids must be integers \[b, n\]"),
  "nothing": (dict(ids=np.zeros((2, 0), int)), r"n of at least 1, got shape \[2, 0\]"),
  "long": (dict(ids=np.zeros((1, 13), int)), "at most 12"),
  "float": (dict(ids=np.zeros((1, 3))), "float64"),
  "id": (dict(ids=[[3, 24]]), "token id 24 in ids is out of range"),
  "class": (dict(ids=[[3]], labels=[9]), "class 9 is out of range"),
  "class_count": (dict(ids=[[3]], labels=[1, 2]), "one for each of 1 samples"),
  "text": (dict(ids=[[3]], text_embeddings=np.zeros((1, 2, 16))), "takes no text"),
}


@pytest.mark.parametrize("case", BAD_LOGITS)
def test_bad_arguments_of_logits(case):
  kwargs, message = BAD_LOGITS[case]
  with pytest.raises(ValueError, match=message) as e:
    tiny("class").logits(**kwargs)
  assert "\n" not in str(e.value)


BAD_TRIM = {
  "rank": ([1, 2], r"ids must be integers \[b, n\]"),
  "nothing": (None, "ids=None must be an array of numbers"),
  "float": ([[1.5]], "got float64"),
  "wraps": ([[2**32]], "token id 4294967296 in ids is out of range"),
}


@pytest.mark.parametrize("case", BAD_TRIM)
def test_bad_arguments_of_trim(case):
  ids, message = BAD_TRIM[case]
  with pytest.raises(ValueError, match=message):
    tiny("class").trim(ids)


def test_sequences_are_cut_at_the_first_stop():
  assert [row.tolist() for row in tiny("class").trim([[1, 24, 2], [3, 4, 5]])] == [[1], [3, 4, 5]]


def test_numbers_of_numpy_and_jax_are_accepted():
  sampler = conditions.token_sampler(
    np.float64(2), jax.numpy.float32(0.5), np.int64(3), np.float32(0), np.bool_(False), 9, 4
  )
  assert sampler == TokenSampler(guidance_scale=2.0, temperature=0.5, top_p=None, top_k=3, greedy=False)
  for number in (np.int64(3), np.uint8(3), jax.numpy.int32(3), np.array(3)):
    assert validation.token_count(number, 6) == 3
  with pytest.raises(ValueError, match="num_tokens=True must be a whole number from 1 to 6"):
    validation.token_count(True, 6)


@pytest.mark.parametrize("path", [None, 3, b"folder"])
def test_paths_are_texts(path):
  for call in (flextok_jax.load, flextok_jax.load_ar, tiny("class").save):
    with pytest.raises(ValueError, match="(source|folder)=.* must be a path"):
      call(path)


def test_bad_files(tmp_path):
  gen = tiny("none")
  gen.save(tmp_path / "gen")
  with pytest.raises(ValueError, match="no setting like 'vocab' can be given"):
    flextok_jax.load_ar(tmp_path / "gen", vocab=24)
  for dtype in ("int8", "float16"):
    with pytest.raises(ValueError, match=f"dtype must be one of float32, bfloat16, got '{dtype}'"):
      flextok_jax.load_ar(tmp_path / "gen", dtype)
  with pytest.raises(FileNotFoundError, match="nowhere"):
    flextok_jax.load_ar(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="takes no prompts"):
    gen.encode_text(["red"])


def test_a_tokenizer_is_not_a_generator(tmp_path):
  config = numpy_ar.common.derive(stage="vae", vae=dict(block_out_channels=(8,), norm_groups=4, layers_per_block=1))
  draw = lambda x: np.zeros(x.shape, np.float32)
  saving.save_folder(tmp_path / "vae", config, jax.tree.map(draw, loading.abstract_params(config)))
  with pytest.raises(ValueError, match="stage 'vae', not a generator: load it by flextok_jax.load"):
    flextok_jax.load_ar(tmp_path / "vae")
