"""Independent reference implementation of the generator: plain numpy, float64, one sample at a time, no cache.

Parameters are the package's tree (layouts are noted where they are read); `c` is config.ar. Also contains what the
generator's tests share: tiny models whose parameters all have generic values, and the names of the authors' weights.
"""

import math

from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from ml_collections import FrozenConfigDict
import numpy as np

from flextok_jax import config as common
from flextok_jax.inference.generator import ARGenerator
from flextok_jax.stages.ar import ARStage

TINY = dict(
  guidance_scale=1.0,
  width=32,
  depth=2,
  head_dim=16,
  num_ids=24,
  num_tokens=12,
  num_classes=5,
  ffn_multiple_of=8,
  loss_chunk=4,
)
TINY_TEXT = dict(encoder="bytes", max_length=10, features=16, mlp_hidden=24, depth=1, head_dim=16)


def tiny(**ar):
  """Returns the config of a tiny generator."""
  return common.derive(stage="ar", dtype="float32", ar={**TINY, **ar}, text=TINY_TEXT)


def abstract_params(config):
  return unbox(jax.eval_shape(ARStage(config).init, jax.random.key(0))[0])


def random_params(config, seed=0):
  """Returns parameters that are all random, including norms and biases, so that omitting any is noticed."""
  rng = np.random.default_rng(seed)
  shapes = flatten_dict(abstract_params(config))
  flat = {}
  for path, x in shapes.items():
    draw = rng.standard_normal(x.shape).astype(np.float32)
    inputs = int(np.prod(x.shape[:-1])) if path[-2] == "out" else x.shape[1 if "blocks" in path else 0]
    flat[path] = {"kernel": draw / math.sqrt(inputs), "scale": 1 + 0.3 * draw, "bias": 0.3 * draw}.get(path[-1], draw)
  return jax.tree.map(jax.numpy.asarray, unflatten_dict(flat))


def tiny_generator(seed=0, **ar):
  config = tiny(**ar)
  return ARGenerator(random_params(config, seed), FrozenConfigDict(config))


def log_softmax(x):
  x = np.asarray(x, np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def forward(params, c, ids, labels, features=None, lengths=None):
  """ids [b, n], labels [b] (-1: none), text features [b, t, f] and lengths [b] -> logits [b, n, outputs]."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  texts = [None] * len(ids)
  if c.condition == "text":
    read = lambda x: _gelu_tanh(x @ p["text_mlp"]["in"]["kernel"]) @ p["text_mlp"]["out"]["kernel"]
    texts = [read(np.asarray(x, np.float64)[:length]) for x, length in zip(features, lengths)]
  return np.stack([_sample(p["ar"], c, *args) for args in zip(ids, labels, texts)])


def _sample(p, c, ids, label, text):
  start = p["start"] + (p["class_embedding"][label] if c.condition == "class" and label >= 0 else 0)
  x = np.stack([start, *(p["embedding"][i] for i in ids[:-1])])
  x = x + (p["positions"] if c.pos_embed == "absolute" else sincos(len(ids), c.width))[: len(ids)]
  for i in range(c.depth):
    block = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
    normed = _norm(x, block["norm_1"], c.norm, c.norm_eps)
    a = block["attention"]
    q, k, v = (_linear(normed, a["qkv"], j) for j in range(3))
    seen = [np.arange(len(x)) <= j for j in range(len(x))]
    x = x + _attend(q, k, v, a, c, seen)
    if text is not None:
      a = block["cross"]
      q = _linear(_norm(x, block["norm_2"], c.norm, c.norm_eps), a["q"])
      x = x + _attend(q, _linear(text, a["kv"], 0), _linear(text, a["kv"], 1), a, c, [slice(None)] * len(x))
    normed = _norm(x, block["norm_2" if text is None else "norm_3"], c.norm, c.norm_eps)
    hidden = _linear(normed, block["mlp"]["in"])
    if c.ffn == "swiglu":
      hidden = hidden / (1 + np.exp(-hidden)) * _linear(normed, block["mlp"]["gate"])
    else:
      hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    x = x + _linear(hidden, block["mlp"]["out"])
  x = _norm(x, p["norm"], c.norm, c.norm_eps)
  if c.head_layernorm:
    x = _norm(x, p["head_norm"], "layernorm")
  return _linear(c.readout_multiplier * x, p["readout"])


def _linear(x, p, part=None):
  """Applies kernel [d, ...], or one part of kernel [d, parts, ...]."""
  kernel, bias = p["kernel"], p.get("bias", 0.0)
  if part is not None:
    kernel, bias = kernel[:, part], bias[part] if "bias" in p else 0.0
  return np.tensordot(x, kernel, 1) + bias


def _norm(x, p, kind, eps=0.0):
  if kind == "rmsnorm":
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + (eps or 1e-6)) * p["scale"]
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + (eps or 1e-5)) * p["scale"] + p["bias"]


def _attend(q, k, v, p, c, seen):
  """q [n, h, e], k and v [m, h, e], a mask of the keys that each query sees -> [n, d]."""
  if c.qk_norm != "none":
    q, k = _norm(q, p["q_norm"], c.qk_norm), _norm(k, p["k_norm"], c.qk_norm)
  out = np.zeros_like(q)
  for i, head in np.ndindex(q.shape[:2]):
    weights = np.exp(k[seen[i], head] @ q[i, head] / math.sqrt(c.head_dim))
    out[i, head] = weights / weights.sum() @ v[seen[i], head]
  return np.tensordot(out, p["out"]["kernel"], 2) + p["out"].get("bias", 0.0)


def sincos(length, width):
  table = np.zeros((length, width))
  for place in range(1, length):
    for j in range(width // 4):
      angle = (place - 1) / 10000 ** (4 * j / width)
      table[place, j :: width // 4] = 0, 1, math.sin(angle), math.cos(angle)
  return table


def _gelu_tanh(x):
  return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def to_official(params):
  """Returns our arrays, or gradients, with the names and layouts of the authors' weights."""
  params = jax.tree.map(np.asarray, params)
  ar, out, own = params["ar"], {}, "models.ar_image_model."

  def linear(name, p, inputs=1):
    out[f"{name}.weight"] = p["kernel"].reshape(math.prod(p["kernel"].shape[:inputs]), -1).T
    if "bias" in p:
      out[f"{name}.bias"] = p["bias"].reshape(-1)

  def norm(name, p):
    out.update({f"{name}.{'weight' if k == 'scale' else k}": v for k, v in p.items()})

  def attention(name, p):
    linear(f"{name}.proj", p["out"], 2)
    for kind in ("q_norm", "k_norm"):
      if kind in p:
        norm(f"{name}.{kind}", p[kind])

  def parts(names, p):
    for i, name in enumerate(names):
      linear(name, {"kernel": p["kernel"][:, i]} | ({"bias": p["bias"][i]} if "bias" in p else {}))

  pre = f"{own}preprocessor."
  out |= {f"{pre}embedding.weight": ar["embedding"], f"{pre}sos_token_embed": ar["start"][None, None]}
  for ours, name in (("positions", "positional_embedding"), ("class_embedding", "cls_embedding.weight")):
    if ours in ar:
      out[pre + name] = ar[ours]
  for i in range(len(ar["blocks"]["norm_1"]["scale"])):
    block, name = jax.tree.map(lambda a, i=i: a[i], ar["blocks"]), f"{own}trunk.blocks.{i}."
    own_attention = name + ("self_attn" if "cross" in block else "attn")
    attention(own_attention, block["attention"])
    linear(f"{own_attention}.qkv", block["attention"]["qkv"])
    if "cross" in block:
      attention(f"{name}cross_attn", block["cross"])
      linear(f"{name}cross_attn.Wq", block["cross"]["q"])
      parts((f"{name}cross_attn.Wk", f"{name}cross_attn.Wv"), block["cross"]["kv"])
    for kind in ("norm_1", "norm_2", "norm_3"):
      if kind in block:
        norm(name + kind, block[kind])
    for ours, official in (("in", "fc1"), ("gate", "fc3"), ("out", "fc2")):
      if ours in block["mlp"]:
        linear(f"{name}mlp.{official}", block["mlp"][ours])
  norm(f"{own}trunk.post_trunk_norm", ar["norm"])
  norm(f"{own}head.norm", ar.get("head_norm", {}))
  linear(f"{own}head.linear", ar["readout"])
  for i, kind in enumerate(("in", "out"), 1):
    if "text_mlp" in params:
      linear(f"models.text_encoder.mlp.fc{i}", params["text_mlp"][kind])
  return out
