"""diffusers' AutoencoderKL: its config.json to our vae section and back, and its parameter names and layouts."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import re
from typing import Any

from flextok_jax.core.literals import join, plain, quote
from flextok_jax.weights.layout import Entry, Shape, count_series
from flextok_jax.weights.official.modules import CHANNELS, Kind, exactly, integer, listed, number

_ANY = Kind("anything", lambda v: True)
_BLOCKS = 16  # levels at most
_REQUIRED = object()

# Field of config.json -> (what is supported, diffusers' default).
_FIELDS = {
  "_class_name": (exactly("AutoencoderKL"), _REQUIRED),
  "_diffusers_version": (_ANY, None),
  "_name_or_path": (_ANY, None),
  "act_fn": (exactly("silu"), "silu"),
  "block_out_channels": (listed(integer(1, 65_536), 1, _BLOCKS), [64]),
  "down_block_types": (listed(exactly("DownEncoderBlock2D"), 1, _BLOCKS), ["DownEncoderBlock2D"]),
  "up_block_types": (listed(exactly("UpDecoderBlock2D"), 1, _BLOCKS), ["UpDecoderBlock2D"]),
  "in_channels": (exactly(3), 3),
  "out_channels": (exactly(3), 3),
  "latent_channels": (CHANNELS, 4),
  "layers_per_block": (integer(1, 64), 1),
  "norm_num_groups": (integer(1, 65_536), 32),
  "scaling_factor": (number(1e-6, 1e6), 0.18215),
  "sample_size": (_ANY, None),
  "force_upcast": (_ANY, None),
  "shift_factor": (exactly(None), None),
  "latents_mean": (exactly(None), None),
  "latents_std": (exactly(None), None),
  "use_quant_conv": (exactly(True), True),
  "use_post_quant_conv": (exactly(True), True),
  "mid_block_add_attention": (exactly(True), True),
}


def from_diffusers(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Converts the config.json of an AutoencoderKL.

  Args:
    fields: of config.json, as literals.parse_json returns them.

  Returns:
    our vae section: kind, latent_channels, block_out_channels (tuple), layers_per_block, norm_groups, scaling_factor,
    sample_posterior, dtype.

  Raises:
    ValueError: one line with the field, its value and what is supported.
  """
  fields = plain(fields, "")
  if type(fields) is not dict:
    raise ValueError(f"the configuration of an AutoencoderKL must be a dictionary, got {quote(fields)}")
  for name, value in fields.items():
    if name not in _FIELDS:
      raise ValueError(f"{join('AutoencoderKL', name)} = {quote(value)} is not supported")
  values = {}
  for name, (kind, default) in _FIELDS.items():
    value = fields.get(name, default)
    if value is _REQUIRED:
      raise ValueError(f"AutoencoderKL.{name} is missing: {kind.supported} needed")
    if not kind.accepts(value):
      raise ValueError(f"AutoencoderKL.{name} must be {kind.supported}, got {quote(value)}")
    values[name] = value
  channels, groups = values["block_out_channels"], values["norm_num_groups"]
  for name in ("down_block_types", "up_block_types"):
    if len(values[name]) != len(channels):
      raise ValueError(
        f"AutoencoderKL.{name} must have {len(channels)} entries, as block_out_channels has, got {quote(values[name])}"
      )
  if any(size % groups for size in channels):
    raise ValueError(f"AutoencoderKL.norm_num_groups must divide block_out_channels {quote(channels)}, got {groups}")
  return dict(
    kind="autoencoder_kl",
    latent_channels=values["latent_channels"],
    block_out_channels=tuple(channels),
    layers_per_block=values["layers_per_block"],
    norm_groups=groups,
    scaling_factor=float(values["scaling_factor"]),
    sample_posterior=True,
    dtype="float32",
  )


def to_diffusers(vae: Mapping[str, Any], image_size: int) -> dict[str, Any]:
  """Returns the fields of the config.json that diffusers' AutoencoderKL.from_pretrained reads.

  Args:
    vae: our vae section. sample_posterior and dtype are not in config.json: diffusers' caller chooses them.
    image_size: side of the images that it was trained on, in pixels.

  Raises:
    ValueError: the VAE is of another kind, or has a size that diffusers does not support.
  """
  if vae["kind"] != "autoencoder_kl":
    raise ValueError(f"vae.kind must be 'autoencoder_kl' to be written as an AutoencoderKL, got {vae['kind']!r}")
  channels = list(vae["block_out_channels"])
  fields = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": channels,
    "down_block_types": ["DownEncoderBlock2D"] * len(channels),
    "in_channels": 3,
    "latent_channels": vae["latent_channels"],
    "layers_per_block": vae["layers_per_block"],
    "norm_num_groups": vae["norm_groups"],
    "out_channels": 3,
    "sample_size": image_size,
    "scaling_factor": vae["scaling_factor"],
    "up_block_types": ["UpDecoderBlock2D"] * len(channels),
  }
  from_diffusers(fields)
  return fields


_NAMES = (  # regular expressions from our path to diffusers' name, applied in turn
  (r"/(kernel|scale)$", "/weight"),
  (r"(down|up)_(\d+)", r"\1_blocks.\2"),
  (r"/mid/", "/mid_block/"),
  (r"resnet_(\d)", r"resnets.\1"),
  (r"attention", "attentions.0"),
  (r"to_out", "to_out.0"),
  (r"(down|up)sample/", r"\1samplers.0.conv/"),
  ("/", "."),
)
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # diffusers before 0.15
_LAYOUTS = {1: "o -> o", 2: "i o -> o i", 4: "h w i o -> o i h w"}


def entry(path: str, shape: Shape, prefix: str = "") -> Entry:
  """Returns the entry of an array "vae/..." of the VAE; `prefix` comes before diffusers' name."""
  name = path.removeprefix("vae/")
  for pattern, replacement in _NAMES:
    name = re.sub(pattern, replacement, name)
  return Entry(path, shape, (prefix + name,), _LAYOUTS[len(shape)])


def with_old_names(entries: Iterable[Entry], names: Iterable[str]) -> Iterator[Entry]:
  """Yields entries with the old names of the attention layers if `names`, of a file's tensors, has them."""
  old = any(".attentions.0.query." in name for name in names)
  for e in entries:
    if old and e.path.startswith("vae/") and ".attentions.0." in e.names[0]:
      name = e.names[0]
      for new, before in _OLD_NAMES.items():
        name = name.replace(f".{new}.", f".{before}.")
      e = dataclasses.replace(e, names=(name,))
    yield e


def read_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Reads the VAE's sizes from {diffusers' name: shape}.

  Returns:
    {"latent_channels", "block_out_channels", "layers_per_block"}.

  Raises:
    ValueError: naming the tensor that is missing.
  """

  def size(name: str, rank: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) != rank:
      raise ValueError(f"the VAE's weights need {name} with {rank} axes, got shape {list(shape) or 'none'}")
    return shape[0]

  levels = range(count_series(shapes, "encoder.down_blocks."))
  return dict(
    latent_channels=size("post_quant_conv.weight", 4),
    block_out_channels=tuple(size(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4) for i in levels),
    layers_per_block=count_series(shapes, "encoder.down_blocks.0.resnets."),
  )
