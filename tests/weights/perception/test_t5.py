"""Files of a T5: single, sharded, from the hub, and damaged ones."""

import json

import jax
import numpy as np
import pytest

from flextok_jax.data import text as text_data
from flextok_jax.parallel.sharding import make_mesh
from flextok_jax.weights.perception import t5 as t5_files
from tests.support.caption_tokenizers import word_level
from tests.support.t5_reference import CONFIG, tensors, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp("t5"), tensors())


def test_single_and_sharded_files_give_the_same_model(folder, tmp_path):
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


def test_load_from_the_hub(tmp_path, monkeypatch):
  """Loads a cached repository; a shard without encoder tensors is not needed."""
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
def test_unsupported_configs_are_refused(folder, tmp_path, change, words):
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
def test_index_may_only_name_files_in_its_folder(tmp_path, place):
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
  with pytest.raises(ValueError, match="dtype must be one of"):
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
