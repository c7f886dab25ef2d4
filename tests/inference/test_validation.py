"""Bad arguments of the generator: one-line errors that contain the value."""

import functools
import math

import jax
import numpy as np
import pytest

import flextok_jax
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
  "class_count": ("class", dict(labels=[1, 2], batch_size=3), "batch_size says 3, labels says 2"),
  "no_samples": ("class", dict(labels=[]), "labels is empty"),
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
  "temperature_zero": ("class", dict(temperature=0.0), "temperature=0.0 must be above 0; greedy=True"),
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
  "prefix_count": ("class", dict(prefix=np.zeros((2, 3), int), labels=[1, 2, 3]), "labels says 3, prefix says 2"),
  "no_key": ("class", dict(key=None), "pass key=jax.random.key"),
  "keys": ("class", dict(key=jax.random.split(KEY, 2), labels=[1, 2, 3]), "labels says 3, key says 2"),
  "key_number": ("class", dict(key=3), "key"),
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


def test_bad_files(tmp_path):
  gen = tiny("none")
  gen.save(tmp_path / "gen")
  with pytest.raises(ValueError, match="no setting like 'vocab' can be given"):
    flextok_jax.load_ar(tmp_path / "gen", vocab=24)
  with pytest.raises(ValueError, match="dtype must be a floating-point type .* 'int8'"):
    flextok_jax.load_ar(tmp_path / "gen", "int8")
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
