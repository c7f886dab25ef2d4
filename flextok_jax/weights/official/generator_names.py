"""Parameter names and layouts in the authors' generator files.

Their linear layers are [out, in]; rows of fused queries, keys and values are all of q, then k, then v, each by head.
"""

from flextok_jax.weights.layout import Entry, Shape, block_entry

MODEL = "models.ar_image_model."
BLOCKS = f"{MODEL}trunk.blocks"
TEXT_MLP = "models.text_encoder.mlp."
POSITIONS = f"{MODEL}preprocessor.positional_embedding"
READOUT = f"{MODEL}head.linear.weight"

_OUTSIDE = {  # our array: (official name, layout)
  "ar/embedding": (f"{MODEL}preprocessor.embedding.weight", "n d -> n d"),
  "ar/start": (f"{MODEL}preprocessor.sos_token_embed", "d -> 1 1 d"),
  "ar/positions": (POSITIONS, "n d -> n d"),
  "ar/class_embedding": (f"{MODEL}preprocessor.cls_embedding.weight", "n d -> n d"),
  "ar/norm/scale": (f"{MODEL}trunk.post_trunk_norm.weight", "d -> d"),
  "ar/norm/bias": (f"{MODEL}trunk.post_trunk_norm.bias", "d -> d"),
  "ar/head_norm/scale": (f"{MODEL}head.norm.weight", "d -> d"),
  "ar/head_norm/bias": (f"{MODEL}head.norm.bias", "d -> d"),
  "ar/readout/kernel": (READOUT, "d n -> n d"),
  "ar/readout/bias": (f"{MODEL}head.linear.bias", "n -> n"),
  "text_mlp/in/kernel": (f"{TEXT_MLP}fc1.weight", "i o -> o i"),
  "text_mlp/out/kernel": (f"{TEXT_MLP}fc2.weight", "i o -> o i"),
}
_BLOCK = {  # our array in a block: (official modules in it, layout, axis of the fused parts or -1)
  "attention/qkv/kernel": (("{attn}.qkv",), "d p h e -> (p h e) d", -1),
  "attention/qkv/bias": (("{attn}.qkv",), "p h e -> (p h e)", -1),
  "attention/out/kernel": (("{attn}.proj",), "h e d -> d (h e)", -1),
  "attention/out/bias": (("{attn}.proj",), "d -> d", -1),
  "cross/q/kernel": (("cross_attn.Wq",), "d h e -> (h e) d", -1),
  "cross/q/bias": (("cross_attn.Wq",), "h e -> (h e)", -1),
  "cross/kv/kernel": (("cross_attn.Wk", "cross_attn.Wv"), "d h e -> (h e) d", 1),
  "cross/kv/bias": (("cross_attn.Wk", "cross_attn.Wv"), "h e -> (h e)", 0),
  "cross/out/kernel": (("cross_attn.proj",), "h e d -> d (h e)", -1),
  "cross/out/bias": (("cross_attn.proj",), "d -> d", -1),
  "mlp/in/kernel": (("mlp.fc1",), "d f -> f d", -1),
  "mlp/in/bias": (("mlp.fc1",), "f -> f", -1),
  "mlp/gate/kernel": (("mlp.fc3",), "d f -> f d", -1),
  "mlp/gate/bias": (("mlp.fc3",), "f -> f", -1),
  "mlp/out/kernel": (("mlp.fc2",), "f d -> d f", -1),
  "mlp/out/bias": (("mlp.fc2",), "d -> d", -1),
} | {
  f"{ours}/{kind}": ((official,), "d -> d", -1)
  for ours, official in {
    **{f"norm_{i}": f"norm_{i}" for i in (1, 2, 3)},
    **{f"attention/{x}_norm": f"{{attn}}.{x}_norm" for x in "qk"},
    **{f"cross/{x}_norm": f"cross_attn.{x}_norm" for x in "qk"},
  }.items()
  for kind in ("scale", "bias")
}
_SEPARATE_QKV = {  # in the class of attention with linear layers of their own for queries, keys and values
  "attention/qkv/kernel": (("{attn}.q_proj", "{attn}.k_proj", "{attn}.v_proj"), "d h e -> (h e) d", 1),
  "attention/qkv/bias": (("{attn}.q_proj", "{attn}.k_proj", "{attn}.v_proj"), "h e -> (h e)", 0),
}
BIASES = {  # setting: endings of the biases' names
  "qkv_bias": (".qkv.bias", ".q_proj.bias", ".Wq.bias"),
  "proj_bias": (".proj.bias",),
  "mlp_bias": (".fc1.bias", ".fc2.bias", ".fc3.bias"),
  "head_bias": ("head.linear.bias",),
}


def entry(path: str, shape: Shape, text: bool, separate_qkv: bool) -> Entry:
  """Returns the entry of one of our arrays.

  Args:
    path: of the array.
    shape: of the array.
    text: whether the generator is conditioned on text.
    separate_qkv: whether queries, keys and values have linear layers of their own.
  """
  if path in _OUTSIDE:
    name, layout = _OUTSIDE[path]
    return Entry(path, shape, (name,), layout)
  inner = path.removeprefix("ar/blocks/")
  modules, layout, axis = (_BLOCK | _SEPARATE_QKV if separate_qkv else _BLOCK)[inner]
  suffix = ".bias" if inner.endswith("/bias") else ".weight"
  names = (module.format(attn="self_attn" if text else "attn") for module in modules)
  return block_entry(path, shape, BLOCKS, names, suffix, layout, axis)


def is_linear_bias(entry: Entry) -> bool:
  """Whether an array is a bias of linear layers."""
  return entry.names[0].endswith(sum(BIASES.values(), ()) + (".Wk.bias",))
