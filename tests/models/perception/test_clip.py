"""CLIP against transformers under the same random weights; its files, its tokenizer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flextok_jax.data.text import CLIPTokenizer
from flextok_jax.models.perception import clip
from flextok_jax.models.perception.clip import CLIP
from flextok_jax.weights.perception.clip import load_clip
from tests.support import clip_reference
from tests.support.clip_reference import CONFIGS, LENGTHS, STORED


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
  return request.param


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
  return clip_reference.write(case, tmp_path_factory.mktemp(case))


def run(sizes, params, ids, **fields):
  return jax.jit(CLIP(**sizes, **fields).apply)({"params": params}, clip_reference.images(), ids, LENGTHS)


@pytest.mark.parametrize("live", [False, True], ids=["stored", "live"])
def test_features_equal_transformers(case, folder, live):
  if live:
    pytest.importorskip("transformers", exc_type=ImportError)
    want = clip_reference.outputs(case, folder)
  else:
    with np.load(STORED) as file:
      want = {name: file[f"{case}/{name}"] for name in ("image", "text")}
  image, text = run(*load_clip(folder), clip_reference.ids())
  assert image.dtype == text.dtype == jnp.float32
  np.testing.assert_allclose(image, want["image"], atol=1e-5)
  np.testing.assert_allclose(text, want["text"], atol=1e-5)


def test_padding_and_dtype(case, folder):
  """Padding has no effect; bfloat16 is close; the separate tower returns the same."""
  sizes, params = load_clip(folder)
  ids = clip_reference.ids()
  image, text = run(sizes, params, ids)
  other = np.where(np.arange(11) < LENGTHS[:, None], ids, 7)
  np.testing.assert_allclose(run(sizes, params, other)[1], text, atol=1e-6)
  changed = np.where(np.arange(11) == 1, (ids + 3) % 58, ids)
  assert np.abs(run(sizes, params, changed)[1] - text).max(-1).min() > 1e-3
  for got, want in zip(run(sizes, params, ids, dtype=jnp.bfloat16), (image, text)):
    assert got.dtype == jnp.float32
    assert (got * want).sum(-1).min() > 0.999
  alone = CLIP(**sizes).apply({"params": params}, ids[2:, :5], LENGTHS[2:], method="text_features")
  np.testing.assert_allclose(alone, text[2:], atol=1e-6)
  with pytest.raises(ValueError, match="a text of 12 tokens is longer than CLIP's 11"):
    CLIP(**sizes).apply({"params": params}, np.zeros((1, 12), np.int32), LENGTHS[:1], method="text_features")


def test_preprocess():
  images = jnp.full((1, 30, 40, 3), 0.5)
  got = clip.preprocess(images, 24)
  assert got.shape == (1, 24, 24, 3)
  np.testing.assert_allclose(got[0, 3, 5], [0.0690, 0.1613, 0.3328], atol=1e-4)


def text(change):
  return dict(text_config=clip_reference.TEXT | change)


BAD_CONFIGS = [  # (change, part of the error)
  (dict(model_type="siglip"), "model_type is 'siglip', only 'clip' is supported"),
  (dict(vision_config=[1]), "vision_config must be an object, got .1."),
  (dict(projection_dim=0), "projection_dim must be a whole number from 1"),
  (dict(projection_dim=8), "has shape .*, expected "),
  (text(dict(hidden_act="swish")), "hidden_act 'swish' is not supported"),
  (text(dict(num_hidden_layers=4)), "lacks the tensor text_model.encoder.layers.3"),
  (text(dict(vocab_size=61)), "token_embedding.weight has shape .60, 24., expected .61, 24."),
  (dict(text_config_dict=dict(hidden_size=24)), "has shape|lacks"),  # the defaults of all the others
]


@pytest.mark.parametrize("change,words", BAD_CONFIGS)
def test_unsupported_configs_are_refused(tmp_path, change, words):
  clip_reference.write("openai", tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(CONFIGS["openai"] | change))
  with pytest.raises(ValueError, match=words) as error:
    load_clip(tmp_path)
  assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_files(case, folder, tmp_path):
  """A config with duplicated entries, as in old files, and files in shards."""
  config = dict(CONFIGS[case])
  config |= {"text_config_dict": config["text_config"], "text_config": dict(hidden_size=99), "vision_config_dict": None}
  (tmp_path / "config.json").write_text(json.dumps(config))
  found = load_file(folder / "model.safetensors")
  index = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(found)}
  for file in set(index.values()):
    save_file({k: v for k, v in found.items() if index[k] == file}, tmp_path / file)
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))
  sizes, params = load_clip(folder)
  again_sizes, again = load_clip(tmp_path)
  assert again_sizes == sizes
  jax.tree.map(np.testing.assert_array_equal, params, again)
  name = "text_projection.weight"
  save_file({"x": np.zeros(1, np.float32)}, tmp_path / index[name])
  with pytest.raises(ValueError, match="lacks the tensor .* which the index says it has"):
    load_clip(tmp_path)
  with pytest.raises(FileNotFoundError, match="no such CLIP model: .*/none; give a folder or a repository"):
    load_clip(tmp_path / "none")


def test_tokenizer(tmp_path):
  words, original = clip_reference.write_tokenizer(tmp_path)
  tokenizer = CLIPTokenizer(str(tmp_path), 7)
  captions = ["", "A red bee", "red " * 9]
  ids, lengths = tokenizer(captions)
  assert ids.shape == (3, 7) and ids.dtype == lengths.dtype == np.int32 and tokenizer.vocab_size == len(words)
  red = words.index("red</w>")
  assert ids[2].tolist() == [0, *[red] * 5, 1] and lengths.tolist() == [2, 7, 7]
  for row, length, encoding in zip(ids, lengths, original.encode_batch(captions)):
    assert row[:length].tolist() == encoding.ids[:length] and sum(encoding.attention_mask) == length


def test_tokenizer_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match="has no tokenizer: tokenizer.json is needed"):
    CLIPTokenizer(str(tmp_path))
  with pytest.raises(FileNotFoundError, match="no such folder: .*none'; give a folder with tokenizer.json or"):
    CLIPTokenizer(str(tmp_path / "none"))
  clip_reference.write_tokenizer(tmp_path, "<s>")
  with pytest.raises(ValueError, match="not the tokenizer of a CLIP: it has no"):
    CLIPTokenizer(str(tmp_path))
