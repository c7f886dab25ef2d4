"""Captions: the T5 encoder against its definition in plain numpy, its files, the byte encoder."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flextok_jax.config import derive
from flextok_jax.data import text as text_data
from flextok_jax.models.ar.text import ByteEncoder
from flextok_jax.models.perception.t5 import T5Block, T5Encoder, relative_buckets
from flextok_jax.parallel.sharding import make_mesh
from flextok_jax.stages.ar import make_text_encoder
from flextok_jax.weights.perception import t5 as t5_files
from tests.support.caption_tokenizers import word_level

CONFIG = dict(
  model_type="t5",
  vocab_size=30,
  d_model=12,
  d_kv=4,
  d_ff=20,
  num_layers=2,
  num_heads=2,
  relative_attention_num_buckets=8,
  relative_attention_max_distance=10,
  layer_norm_epsilon=1e-3,
  feed_forward_proj="gated-gelu",
  num_decoder_layers=2,
  dropout_rate=0.1,
)
LENGTHS = np.array([14, 5, 1], np.int32)


def tensors(gated=True, seed=0):
  """Random weights {name: array} as Hugging Face names them, with a bit of a decoder."""
  rng, c = np.random.default_rng(seed), CONFIG
  inner, mlp = c["num_heads"] * c["d_kv"], ("wi_0", "wi_1") if gated else ("wi",)
  normal = lambda *shape, scale=0.5: (scale * rng.normal(size=shape)).astype(np.float32)
  found = {
    "shared.weight": normal(c["vocab_size"], c["d_model"], scale=1.0),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": normal(8, 2, scale=1.0),
    "encoder.final_layer_norm.weight": normal(c["d_model"]),
    "decoder.final_layer_norm.weight": normal(c["d_model"]),
    "lm_head.weight": normal(3),
  }
  for i in range(c["num_layers"]):
    layer = f"encoder.block.{i}.layer"
    found |= {f"{layer}.0.SelfAttention.{x}.weight": normal(inner, c["d_model"]) for x in "qkv"}
    found |= {f"{layer}.1.DenseReluDense.{x}.weight": normal(c["d_ff"], c["d_model"]) for x in mlp}
    found |= {
      f"{layer}.0.SelfAttention.o.weight": normal(c["d_model"], inner),
      f"{layer}.1.DenseReluDense.wo.weight": normal(c["d_model"], c["d_ff"]),
      f"{layer}.0.layer_norm.weight": normal(c["d_model"]),
      f"{layer}.1.layer_norm.weight": normal(c["d_model"]),
    }
  return found


def write(folder, found, *, shards=0, **config):
  """Writes a folder in Hugging Face's format, the tensors dealt out to `shards` files, or in one."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(CONFIG | config))
  if not shards:
    save_file(found, folder / "model.safetensors")
    return folder
  index = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(found)}
  for file in sorted(set(index.values())):
    save_file({k: v for k, v in found.items() if index[k] == file}, folder / file)
  (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
  return folder


def bucket(distance: int, buckets: int, furthest: int) -> int:
  """T5's bucket of a key so many positions behind the query."""
  first = buckets // 2 if distance > 0 else 0
  distance, half = abs(distance), buckets // 2
  exact = half // 2
  if distance < exact:
    return first + distance
  share = math.log(distance / exact) / math.log(furthest / exact)
  return first + min(exact + int(share * (half - exact)), half - 1)


def t5_reference(found, ids, gated):
  """The encoder's definition, float64: ids [t] of one text without padding -> [t, d_model]."""
  c = CONFIG
  w = {k.removeprefix("encoder.").removesuffix(".weight"): v.astype(np.float64) for k, v in found.items()}
  norm = lambda x, scale: scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + c["layer_norm_epsilon"])
  table = w["block.0.layer.0.SelfAttention.relative_attention_bias"]
  where = [[bucket(k - q, 8, 10) for k in range(len(ids))] for q in range(len(ids))]
  x = w["shared"][ids]
  for i in range(c["num_layers"]):
    p = f"block.{i}.layer"
    h, added = norm(x, w[f"{p}.0.layer_norm"]), []
    for head in range(c["num_heads"]):
      part = slice(head * c["d_kv"], (head + 1) * c["d_kv"])
      q, k, v = (h @ w[f"{p}.0.SelfAttention.{name}"][part].T for name in "qkv")
      e = np.exp(q @ k.T + table[where, head])
      added.append(e / e.sum(-1, keepdims=True) @ v)
    x = x + np.concatenate(added, -1) @ w[f"{p}.0.SelfAttention.o"].T
    h = norm(x, w[f"{p}.1.layer_norm"])
    if gated:
      a, b = (h @ w[f"{p}.1.DenseReluDense.{name}"].T for name in ("wi_0", "wi_1"))
      h = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) * b
    else:
      h = np.maximum(h @ w[f"{p}.1.DenseReluDense.wi"].T, 0)
    x = x + h @ w[f"{p}.1.DenseReluDense.wo"].T
  return norm(x, w["final_layer_norm"])


def some_ids(vocab=30, length=14):
  return np.random.default_rng(1).integers(2, vocab, (len(LENGTHS), length)).astype(np.int32)


def kept(features, lengths=LENGTHS):
  """The features that mean something, in a row."""
  return np.concatenate([np.asarray(f, np.float32)[:n] for f, n in zip(features, lengths)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp("t5"), tensors())


# The T5 encoder.


@pytest.mark.parametrize("buckets,furthest", [(32, 128), (8, 10), (16, 40)])
def test_relative_buckets(buckets, furthest):
  got = relative_buckets(200, buckets, furthest)
  assert got.dtype == np.int32
  for query in (0, 60, 199):
    assert got[query].tolist() == [bucket(key - query, buckets, furthest) for key in range(200)]
  assert set(got.ravel()) == set(range(buckets)) - {buckets // 2}  # distance 0 is never ahead


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "relu"])
def test_t5_is_its_definition(gated, tmp_path):
  found = tensors(gated)
  write(tmp_path, found, shards=3, feed_forward_proj="gated-gelu" if gated else "relu")
  sizes, params = t5_files.load_t5(tmp_path, "float32")
  assert sizes["gated"] == gated and sizes["layer_norm_epsilon"] == 1e-3
  ids = some_ids()
  got = T5Encoder(**sizes).apply({"params": params}, ids, LENGTHS)
  assert got.shape == (3, 14, 12) and got.dtype == jnp.float32
  want = np.concatenate([t5_reference(found, row[:n], gated) for row, n in zip(ids, LENGTHS)])
  np.testing.assert_allclose(kept(got), want, atol=3e-5)


def test_padding_has_no_influence(folder):
  sizes, params = t5_files.load_t5(folder, "float32")
  run = jax.jit(T5Encoder(**sizes).apply)
  ids = some_ids()
  other = np.where(np.arange(14) < LENGTHS[:, None], ids, 29 - ids)
  assert (other != ids).any()
  wider = np.pad(ids, ((0, 0), (0, 3)), constant_values=7)
  one = kept(run({"params": params}, ids, LENGTHS))
  np.testing.assert_array_equal(kept(run({"params": params}, other, LENGTHS)), one)
  np.testing.assert_allclose(kept(run({"params": params}, wider, LENGTHS)), one, atol=1e-5)


def test_bfloat16_keeps_the_stream_in_float32(folder):
  """The features are near, and what a block adds to features in the thousands, where bfloat16 has steps of 16, too."""
  sizes, params = t5_files.load_t5(folder, "bfloat16")
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
  run = lambda dtype: T5Encoder(**sizes, dtype=dtype).apply({"params": params}, some_ids(), LENGTHS)
  want, got = run(jnp.float32), run(jnp.bfloat16)
  assert got.dtype == jnp.bfloat16
  assert np.abs(kept(got) - kept(want)).mean() < 0.05 * kept(want).std()
  rng = np.random.default_rng(0)
  x = jnp.asarray(3000 * rng.normal(size=(3, 14, 12)), jnp.float32)
  bias = jnp.asarray(rng.normal(size=(1, 2, 14, 14)), jnp.float32)
  first = jax.tree.map(lambda x: x[0], params["blocks"])
  want, got = (
    T5Block(2, 4, 20, 1e-3, True, d).apply({"params": first}, x, bias, LENGTHS)[0] - x
    for d in (jnp.float32, jnp.bfloat16)
  )
  assert np.abs(kept(got) - kept(want)).mean() < 0.05 * kept(want).std()


def test_files_whole_and_in_shards_are_one_model(folder, tmp_path):
  found = tensors()
  found["encoder.embed_tokens.weight"] = found.pop("shared.weight")  # its other name
  write(tmp_path, found, shards=4)
  decoder = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
  sizes, params = t5_files.load_t5(folder, "float32")
  assert t5_files.read_sizes(tmp_path) == sizes
  again_sizes, again = t5_files.load_t5(tmp_path, "float32", make_mesh())
  assert again_sizes == sizes and decoder
  assert len(again["embedding"].sharding.device_set) == jax.device_count()
  assert jax.tree.structure(params) == jax.tree.structure(again)
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
  """Of a cached repository; a shard with nothing of the encoder is not asked for."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(FileNotFoundError, match=r"Download config.json and model.safetensors .*huggingface.co/some/t5"):
    t5_files.load_t5("some/t5", "float32")
  root = tmp_path / "models--some--t5"
  snapshot = write(root / "snapshots" / ("0" * 40), tensors(), shards=2)
  (root / "refs").mkdir()
  (root / "refs" / "main").write_text("0" * 40)
  index = json.loads((snapshot / "model.safetensors.index.json").read_text())
  index["weight_map"]["lm_head.weight"] = "model-00009-of-00009.safetensors"
  (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
  assert t5_files.load_t5("some/t5", "float32")[0]["d_model"] == 12
  word_level(snapshot)
  assert text_data.make_tokenizer("t5", 10, "some/t5")(["red"])[1].tolist() == [2]


Q = "encoder.block.1.layer.0.SelfAttention.q.weight"
BAD_CONFIG = [  # (change, part of the error)
  (dict(model_type="bert"), "model_type is 'bert', only 't5'"),
  (dict(feed_forward_proj="gated-silu"), "feed_forward_proj 'gated-silu' is not supported"),
  (dict(dense_act_fn="gelu"), "dense_act_fn 'gelu' is not supported"),
  (dict(quantization_config={"bits": 4}), "quantization_config"),
  (dict(num_layers=3), "lacks the tensor encoder.block.2"),
  (dict(num_layers=10**9), "num_layers must be a whole number from 1 to 1000, got 1000000000"),
  (dict(d_model=True), "d_model must be a whole number"),
  (dict(d_ff=24), r"DenseReluDense.* has shape \[.*expected"),
  (dict(relative_attention_num_buckets=6), "relative_attention_num_buckets=6"),
  (dict(relative_attention_max_distance=2), "relative_attention_max_distance=2"),
  (dict(layer_norm_epsilon="small"), "layer_norm_epsilon must lie between 0 and 1, got 'small'"),
]


@pytest.mark.parametrize(
  "change,words", BAD_CONFIG, ids=[next(iter(change)) + str(i) for i, (change, _) in enumerate(BAD_CONFIG)]
)
def test_configurations_that_are_not_computed(folder, tmp_path, change, words):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
  (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
  with pytest.raises(ValueError, match=words) as error:
    t5_files.load_t5(tmp_path, "float32")
  assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
  "place",
  [
    "../model.safetensors",
    "/model.safetensors",
    "a/b.safetensors",
    "x.bin",
    ".x.safetensors",
    "..",
    "a\n.safetensors",
    3,
  ],
)
def test_an_index_names_files_of_its_folder_alone(tmp_path, place):
  write(tmp_path, tensors(), shards=2)
  index = tmp_path / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  values["weight_map"][Q] = place
  index.write_text(json.dumps(values))
  with pytest.raises(ValueError, match="not the plain name of a .safetensors file"):
    t5_files.load_t5(tmp_path, "float32")


def test_missing_files_and_tensors(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such T5 encoder: .*/none; give a folder"):
    t5_files.load_t5(tmp_path / "none", "float32")
  found = tensors()
  write(tmp_path / "a", {k: v for k, v in found.items() if k != Q})
  with pytest.raises(ValueError, match=f"lacks the tensor {Q}, which"):
    t5_files.load_t5(tmp_path / "a", "float32")
  with pytest.raises(ValueError, match="dtype must be a floating-point type"):
    t5_files.load_t5(tmp_path / "a", "int8")
  (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match="lacks model.safetensors .*pytorch_model.bin is not supported"):
    t5_files.load_t5(tmp_path / "a", "float32")
  write(tmp_path / "b", found, shards=2)
  place = "model-00002-of-00002.safetensors"
  whole = (tmp_path / "b" / place).read_bytes()
  (tmp_path / "b" / place).write_bytes(whole[:100])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    t5_files.load_t5(tmp_path / "b", "float32")
  (tmp_path / "b" / place).unlink()
  with pytest.raises(FileNotFoundError, match=f"lacks {place}"):
    t5_files.load_t5(tmp_path / "b", "float32")
  (tmp_path / "b" / "model.safetensors.index.json").write_text("{}")
  with pytest.raises(ValueError, match="no weight_map"):
    t5_files.load_t5(tmp_path / "b", "float32")


# The byte encoder.


def test_byte_encoder():
  c = dict(encoder="bytes", max_length=14, features=16, depth=3, head_dim=8)
  encoder = make_text_encoder(derive(stage="ar", dtype="float32", text=c))
  assert isinstance(encoder, ByteEncoder)
  ids = some_ids(257)
  params = jax.jit(encoder.init)(jax.random.key(0), ids, LENGTHS)
  run = jax.jit(encoder.apply)
  one = kept(run(params, ids, LENGTHS))
  assert one.shape == (LENGTHS.sum(), 16)
  np.testing.assert_allclose(one.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(one.std(-1), 1, atol=1e-3)
  other = np.where(np.arange(14) < LENGTHS[:, None], ids, 256 - ids)
  np.testing.assert_array_equal(kept(run(params, other, LENGTHS)), one)
  np.testing.assert_allclose(kept(run(params, ids[:, :5], np.minimum(LENGTHS, 5)), LENGTHS)[-6:], one[-6:], atol=1e-5)
  # What a text holds does matter, and where.
  for changed in (np.where(np.arange(14) == 4, 300 - ids, ids) % 257, ids[:, [1, 0, *range(2, 14)]]):
    assert np.abs(kept(run(params, changed, LENGTHS))[: LENGTHS[0]] - one[: LENGTHS[0]]).min(0).max() > 1e-4
  with pytest.raises(ValueError, match="a text of 15 bytes"):
    encoder.init(jax.random.key(0), some_ids(257, 15), LENGTHS)


def test_make_text_encoder(folder):
  sizes = t5_files.read_sizes(folder)
  encoder = make_text_encoder(derive(text=dict(features=12)), sizes)
  assert isinstance(encoder, T5Encoder) and encoder.dtype == jnp.bfloat16 and encoder.d_ff == 20
  for kwargs, given, words in (
    (dict(), sizes, "text.features=12"),
    (dict(), None, "config.json"),
    (dict(encoder="clip"), None, "'clip': use one of t5, bytes"),
    (dict(encoder="bytes", features=100), None, "features=100 is not a multiple"),
    (dict(encoder="bytes", depth=0), None, "depth must be at least 1"),
  ):
    with pytest.raises(ValueError, match=words):
      make_text_encoder(derive(text=kwargs), given)
