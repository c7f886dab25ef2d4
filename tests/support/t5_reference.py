"""A tiny T5: a reference implementation in plain numpy, and random weights in Hugging Face's file format."""

import json
import math

import numpy as np
from safetensors.numpy import save_file

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
  """Returns random weights {name: array} with Hugging Face's names, including a few decoder tensors."""
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
  """Writes a folder in Hugging Face's format, with the tensors in one file or distributed over `shards` files."""
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
  """T5's bucket of a key that is `distance` positions before the query."""
  first = buckets // 2 if distance > 0 else 0
  distance, half = abs(distance), buckets // 2
  exact = half // 2
  if distance < exact:
    return first + distance
  share = math.log(distance / exact) / math.log(furthest / exact)
  return first + min(exact + int(share * (half - exact)), half - 1)


def t5_reference(found, ids, gated):
  """Reference encoder in float64: ids [t] of one text without padding -> [t, d_model]."""
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
  """Returns the features that are not padding, concatenated."""
  return np.concatenate([np.asarray(f, np.float32)[:n] for f, n in zip(features, lengths)])
