"""Where each of our arrays stands in official files: names and layouts, both ways; numpy only.

Official linear layers are [out, in] and convolutions [out, in, kh, kw], every block and projection on its own. Ours are
[in, out] and [kh, kw, in, out]; blocks are stacked, and q, k, v (and the two halves of a gated MLP) are one array.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import re

from einops import parse_shape, rearrange
import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
  """One of our arrays and the official tensors that it consists of.

  Attributes:
    path: ours, "a/b/c".
    shape: ours.
    names: official names; by block, then by fused part.
    layout: einops pattern from our part to the official tensor.
    stacked: whether ours holds a block after another.
    parts: fused parts a block.
    axis: where the fused parts stand within a block of ours, -1 where nothing is fused.
  """

  path: str
  shape: tuple[int, ...]
  names: tuple[str, ...]
  layout: str
  stacked: bool = False
  parts: int = 1
  axis: int = -1

  def view(self, array: np.ndarray, index: int) -> np.ndarray:
    """Returns the part of our array that is the official tensor names[index]; writing to it writes to the array."""
    block, part = divmod(index, self.parts)
    if self.stacked:
      array = array[block]
    return array if self.axis < 0 else np.moveaxis(array, self.axis, 0)[part]

  def to_official(self, array: np.ndarray, index: int) -> np.ndarray:
    return rearrange(self.view(array, index), self.layout)

  def from_official(self, tensor: np.ndarray, array: np.ndarray, index: int):
    """Writes an official tensor into our array, in our array's type."""
    view = self.view(array, index)
    ours, official = self.layout.split(" -> ")
    view[...] = rearrange(tensor, f"{official} -> {ours}", **parse_shape(view, ours))

  @property
  def official_shape(self) -> tuple[int, ...]:
    """The shape of each official tensor."""
    return self.to_official(np.broadcast_to(np.int8(0), self.shape), 0).shape  # nothing is allocated


_LINEAR = {"kernel": ("weight", "i o -> o i"), "bias": ("bias", "o -> o")}
# Of ours, what follows the role's name: (suffix of the official module, kinds).
_HEADS = {
  "encoder/patch_embed": ".patch_proj",
  "encoder/head": ".proj",
  "decoder/code_embed": ".proj",
  "decoder/patch_embed": ".patch_proj",
  "decoder/head": ".proj",
}
_TABLES = {  # ours: (role, name in the official module, layout)
  "encoder/registers": ("encoder/registers", "registers", "n d -> n d"),
  "encoder/positions": ("encoder/positions", "posembs", "a n d -> a 1 d n"),
  "decoder/positions": ("decoder/positions", "posembs", "a n d -> a 1 d n"),
  "decoder/register_positions": ("decoder/register_positions", "posembs", "n d -> 1 1 d n"),
  "decoder/mask_token": ("decoder/nested_dropout", "dropout_mask_token", "d -> d"),
  "decoder/null_token": ("decoder/null_condition", "nullcond", "d -> d"),
}
_BLOCK = {  # ours in a block: (official modules in it, layout, axis of the fused parts or -1)
  "attention/qkv/kernel": (("attn.wq", "attn.wk", "attn.wv"), "d h e -> (h e) d", 1),
  "attention/qkv/bias": (("attn.wq", "attn.wk", "attn.wv"), "h e -> (h e)", 0),
  "attention/out/kernel": (("attn.proj",), "h e d -> d (h e)", -1),
  "attention/out/bias": (("attn.proj",), "d -> d", -1),
  "mlp/in/kernel": (("mlp.fc1", "mlp.fc3"), "d f -> f d", 1),
  "mlp/in/bias": (("mlp.fc1", "mlp.fc3"), "f -> f", 0),
  "mlp/out/kernel": (("mlp.fc2",), "f d -> d f", -1),
  "mlp/out/bias": (("mlp.fc2",), "d -> d", -1),
}
_ADALN = {"kernel": ("weight", "d o -> o d"), "bias": ("bias", "o -> o")}  # of all blocks, stacked
_VAE = (  # regular expressions from our path to diffusers' name, applied in turn
  (r"/(kernel|scale)$", "/weight"),
  (r"(down|up)_(\d+)", r"\1_blocks.\2"),
  (r"/mid/", "/mid_block/"),
  (r"resnet_(\d)", r"resnets.\1"),
  (r"attention", "attentions.0"),
  (r"to_out", "to_out.0"),
  (r"(down|up)sample/", r"\1samplers.0.conv/"),
  ("/", "."),
)
_OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # diffusers before 0.15
VAE_PREFIX = "vae.vae."  # inside a tokenizer's file


def tokenizer_entry(path: str, shape: tuple[int, ...], roles: Mapping[str, str], depths: Mapping[str, int]) -> Entry:
  """Returns the entry of an encoder's or decoder's array.

  Args:
    roles: as of official_config.from_official.
    depths: {"encoder": number of blocks, "decoder": ...}.
  """
  module, _, kind = path.rpartition("/")
  half, _, inner = path.partition("/")
  part = re.fullmatch(r"transformer/(blocks|last)/(.*)", inner)
  if part:
    modules, layout, axis = _BLOCK[part[2]]
    if part[1] == "last":  # stands apart, unstacked
      blocks, sizes = [depths[half] - 1], shape
    else:
      blocks, sizes = range(shape[0]), shape[1:]
    if axis >= 0:
      modules = modules[: sizes[axis]]  # a plain MLP has no fc3
    prefix, suffix = roles[f"{half}/transformer"], "bias" if kind == "bias" else "weight"
    names = (f"{prefix}.blocks.{i}.{name}.{suffix}" for i in blocks for name in modules)
    return Entry(path, shape, tuple(names), layout, part[1] == "blocks", len(modules), axis)
  if module == "decoder/adaln":
    suffix, layout = _ADALN[kind]
    prefix = roles["decoder/transformer"]
    names = (f"{prefix}.blocks.{i}.adaLN_modulation.1.{suffix}" for i in range(shape[0]))
    return Entry(path, shape, tuple(names), layout, True)
  if path in _TABLES:
    role, name, layout = _TABLES[path]
    return Entry(path, shape, (f"{roles[role]}.{name}",), layout)
  suffix, layout = _LINEAR[kind]
  if module == "decoder/adaln/head":
    name = roles["decoder/head"] + ".adaLN_modulation.1"
  elif module.startswith("decoder/time_embed/"):
    name = roles["decoder/time_embed"] + (".mlp.0" if module.endswith("/in") else ".mlp.2")
  else:
    name = roles[module] + _HEADS[module]
  return Entry(path, shape, (f"{name}.{suffix}",), layout)


def vae_entry(path: str, shape: tuple[int, ...], old: bool = False) -> Entry:
  """Returns the entry of an array of the VAE (path "vae/...") in diffusers' names, without prefix."""
  name = path.removeprefix("vae/")
  for pattern, replacement in _VAE:
    name = re.sub(pattern, replacement, name)
  if old and ".attentions.0." in name:
    for new, before in _OLD_VAE.items():
      name = name.replace(f".{new}.", f".{before}.")
  layout = {1: "o -> o", 2: "i o -> o i", 4: "h w i o -> o i h w"}[len(shape)]
  return Entry(path, shape, (name,), layout)


def own_entry(path: str, shape: tuple[int, ...]) -> Entry:
  """Returns the entry of an array in our own files: its path, as it is."""
  axes = " ".join(f"a{i}" for i in range(len(shape)))
  return Entry(path, shape, (path,), f"{axes} -> {axes}")


def entries(
  shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, str], vae_prefix: str = VAE_PREFIX, old_vae: bool = False
) -> Iterator[Entry]:
  """Yields the entry of every array, for {path: shape} of a parameter tree."""
  depths = {}
  for half in ("encoder", "decoder"):
    stacked = shapes.get(f"{half}/transformer/blocks/mlp/out/kernel", (0,))
    depths[half] = 1 + stacked[0]
  for path, shape in shapes.items():
    if path.startswith("vae/"):
      entry = vae_entry(path, shape, old_vae)
      yield dataclasses.replace(entry, names=(vae_prefix + entry.names[0],))
    else:
      yield tokenizer_entry(path, shape, roles, depths)


def vae_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict:
  """Reads the VAE's sizes off {diffusers' name: shape}.

  Returns:
    {"latent_channels", "block_out_channels", "layers_per_block"}.

  Raises:
    ValueError: naming what is missing.
  """

  def count(prefix: str) -> int:
    indices = {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
    if not indices or indices != {str(i) for i in range(len(indices))}:
      raise ValueError(f"the VAE's weights have no whole series {prefix}0, 1, 2, ...")
    return len(indices)

  def size(name: str, rank: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) != rank:
      raise ValueError(f"the VAE's weights need {name} with {rank} axes, got shape {list(shape) or 'none'}")
    return shape[0]

  levels = range(count("encoder.down_blocks."))
  return dict(
    latent_channels=size("post_quant_conv.weight", 4),
    block_out_channels=tuple(size(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4) for i in levels),
    layers_per_block=count("encoder.down_blocks.0.resnets."),
  )
