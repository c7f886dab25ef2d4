"""The config.json of diffusers' AutoencoderKL to our vae section and back."""

from collections.abc import Mapping
from typing import Any

from flextok_jax.core.literals import join, plain, quote
from flextok_jax.weights.official.modules import CHANNELS, Kind, exactly, integer, listed, number

_ANY = Kind("anything", lambda v: True)
_BLOCKS = 16  # levels at most
_LEFT_OUT = object()

# Entry -> (what is supported, diffusers' default).
_ENTRIES = {
  "_class_name": (exactly("AutoencoderKL"), _LEFT_OUT),
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


def from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
  """Reads diffusers' configuration of an AutoencoderKL.

  Args:
    config: plain data, as literals.parse_json made it of a config.json.

  Returns:
    our vae section: kind, latent_channels, block_out_channels (tuple), layers_per_block, norm_groups, scaling_factor,
    sample_posterior, dtype.

  Raises:
    ValueError: one line with the entry, its value and what is supported.
  """
  config = plain(config, "")
  if type(config) is not dict:
    raise ValueError(f"the configuration of an AutoencoderKL must be a dictionary, got {quote(config)}")
  for name, value in config.items():
    if name not in _ENTRIES:
      raise ValueError(f"{join('AutoencoderKL', name)} = {quote(value)} is not supported")
  values = {}
  for name, (kind, default) in _ENTRIES.items():
    value = config.get(name, default)
    if value is _LEFT_OUT:
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
  """Writes the config.json that diffusers' AutoencoderKL.from_pretrained reads.

  Args:
    vae: our vae section. sample_posterior and dtype have no place in the file: there the caller chooses.
    image_size: pixels a side of the images it was trained on.

  Raises:
    ValueError: the VAE's kind is another, or a size that diffusers cannot build.
  """
  if vae["kind"] != "autoencoder_kl":
    raise ValueError(f"vae.kind must be 'autoencoder_kl' to be written as an AutoencoderKL, got {vae['kind']!r}")
  channels = list(vae["block_out_channels"])
  config = {
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
  from_diffusers(config)
  return config
