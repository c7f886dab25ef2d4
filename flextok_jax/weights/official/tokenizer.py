"""Reads the configuration of official tokenizers.

An official file describes a model as nested constructor calls, whose modules exchange values under keys. It is checked
against a whitelist of classes and arguments (modules.py) and the keys are followed (wiring.py). Options that our models
support are converted; the others are refused by name. Modules that share a key without renaming it (positions, nested
dropout and null condition of the registers) run in the authors' order.
"""

from collections.abc import Mapping
import math
from typing import Any

from flextok_jax.core.literals import plain, quote
from flextok_jax.weights.official.halves import read_decoder, read_encoder
from flextok_jax.weights.official.modules import DTYPES, MODULES, TARGETS, Module, read
from flextok_jax.weights.official.tokenizer_names import DEFAULT_ROLES
from flextok_jax.weights.official.wiring import (
  CODES,
  DECODER,
  ENCODER,
  FLAGS,
  GRID_DECODER,
  GRID_ENCODER,
  KEPT,
  LATENTS,
  TIMES,
  VELOCITY,
  check_key,
  follow,
  is_grid,
  read_half,
)

MAX_IDS = 2**31 - 1
SAMPLER = dict(  # of the authors' demonstrations; not in their files
  num_steps=25, guidance="apg", guidance_scale=7.5, apg_momentum=-0.5, apg_eta=0.0, apg_threshold=2.5
)


def from_official(official: Mapping[str, Any], mup_base_width: int | None = None) -> tuple[dict, dict[str, str]]:
  """Converts an official tokenizer's configuration.

  Args:
    official: plain data: literals.parse_literals of a file's metadata or literals.parse_json of a hub repository's
      config.json, with or without the outermost _target_, or that under the single key "config".
    mup_base_width: width at which a muP readout's multiplier is 1. Only for models with use_mup_readout, whose files
      do not store it.

  Returns:
    settings: nested dict of the fields of flextok_jax/config that describe a model, and vae.hub_id (text or None).
      The VAE's sizes are not in the file; image_size is 0 (it depends on the VAE's downscaling), and so is the number
      of tokens on a grid; vae.scaling_factor is None if the file leaves it to the VAE; max_grid is in patches.
    roles: our module -> full name of the official one, as in DEFAULT_ROLES.

  Raises:
    ValueError: one line with the entry's path, its value and what is supported.
  """
  if mup_base_width is not None and (type(mup_base_width) is not int or mup_base_width < 1):
    raise ValueError(f"mup_base_width must be a whole number of at least 1, got {quote(mup_base_width)}")
  official = plain(official, "")
  if type(official) is dict and set(official) == {"config"}:
    official = official["config"]
  if type(official) is not dict:
    raise ValueError(f"an official configuration must be a dictionary, got {quote(official)}")
  top = read({"_target_": TARGETS["FlexTok"], **official}, "", {k: v for k, v in MODULES.items() if ".FlexTok" in k})
  vae, fsq, noise, pipeline = (
    read(top[section], section, {TARGETS[name]: MODULES[TARGETS[name]]}, partial=name == "MinRFPipeline")
    for section, name in (
      ("vae", "StableDiffusionVAE"),
      ("regularizer", "FSQ"),
      ("flow_matching_noise_module", "MinRFNoiseModule"),
      ("pipeline", "MinRFPipeline"),
    )
  )
  grid = is_grid(top["decoder"])
  encoder = read_half(top["encoder"], "encoder", GRID_ENCODER if grid else ENCODER)
  decoder = read_half(top["decoder"], "decoder", GRID_DECODER if grid else DECODER)
  _check_wiring(vae, encoder, fsq, noise, pipeline, decoder)
  # latent_channels is ignored if the VAE comes from a hub repository.
  patches = encoder["patch_embed"]
  channels = patches["channels_in"] if vae["hf_hub_path"] else vae["latent_channels"]
  _check_channels(channels, encoder, fsq, pipeline, decoder)

  num_registers = 0 if grid else encoder["registers"]["n_max"]
  scaling_factor = vae["scaling_factor"]
  settings = dict(
    stage="tokenizer",
    seed=0,
    image_size=0,
    dtype="float32",
    remat="none",
    init_from="",
    vae=dict(
      kind="autoencoder_kl",
      latent_channels=channels,
      scaling_factor=None if scaling_factor is None else float(scaling_factor),
      sample_posterior=vae["sample_posterior"],
      dtype=DTYPES[vae["dtype_override"] or "fp32"],
      hub_id=vae["hf_hub_path"],
    ),
    encoder=read_encoder(encoder, mup_base_width),
    decoder=read_decoder(decoder, num_registers, mup_base_width),
    tokens=dict(
      layout="grid" if grid else "registers",
      num_registers=num_registers,
      levels=tuple(fsq["levels"]),
      nested_dropout="none" if grid else decoder["nested_dropout"]["size_sampling_mode"],
      mask="token",
      saturation_weight=0.0,
      null_prob=float(decoder["null_condition"]["dropout_prob"]),
    ),
    flow=dict(t_sampling=_t_sampling(noise), mode_scale=float(noise["mode_scale"]), t_shift=1.0, base_size=0),
    sampler=SAMPLER | dict(guidance_scale=5.0) if grid else dict(SAMPLER),
  )
  halves = dict(encoder=encoder, decoder=decoder)
  found = {f"{half}/{name}": module.path for half, modules in halves.items() for name, module in modules.items()}
  roles = {role: found[role] for role in DEFAULT_ROLES if role in found}
  return settings, roles


def _check_wiring(vae: Module, encoder: dict, fsq: Module, noise: Module, pipeline: Module, decoder: dict[str, Module]):
  registers = "registers" in encoder
  state = follow(ENCODER if registers else GRID_ENCODER, encoder, {vae["vae_latents_write_key"]: LATENTS})
  check_key(f"{fsq.path}.latents_read_key", fsq["latents_read_key"], CODES, state)
  start = {
    **({decoder["nested_dropout"]["eval_keep_k_read_key"]: KEPT} if registers else {}),
    decoder["null_condition"]["eval_drop_flag_read_key"]: FLAGS,
    fsq["quants_write_key"]: CODES,
    pipeline["timesteps_read_key"]: TIMES,
    pipeline["noised_images_read_key"]: LATENTS,
  }
  state = follow(DECODER if registers else GRID_DECODER, decoder, start)
  check_key(f"{pipeline.path}.reconst_write_key", pipeline["reconst_write_key"], VELOCITY, state)
  same = lambda module, argument, key: module.check(module[argument] == key, argument, f"key {quote(key)}")
  same(vae, "vae_latents_read_key", pipeline["reconst_write_key"])
  same(noise, "clean_images_read_key", vae["vae_latents_write_key"])
  same(noise, "noised_images_write_key", pipeline["noised_images_read_key"])
  if noise["sigmas_write_key"] != pipeline["timesteps_read_key"]:  # the times are under both keys
    same(noise, "timesteps_write_key", pipeline["timesteps_read_key"])


def _check_channels(channels: int, encoder: dict, fsq: Module, pipeline: Module, decoder: dict[str, Module]):
  same = lambda module, argument, size, of: module.check(module[argument] == size, argument, f"{size}, {of}")
  for half in encoder, decoder:
    same(half["patch_embed"], "channels_in", channels, "the VAE's latent channels")
  same(decoder["head"], "channels_out", channels, "the VAE's latent channels")
  if pipeline["out_channels"] is not None:
    same(pipeline, "out_channels", channels, "the VAE's latent channels")
  levels = fsq["levels"]
  fsq.check(math.prod(levels) <= MAX_IDS, "levels", f"levels with at most {MAX_IDS} combinations")
  same(encoder["head"], "dim_out", len(levels), "the number of regularizer.levels")
  same(decoder["code_embed"], "dim_in", len(levels), "the number of regularizer.levels")


def _t_sampling(noise: Module) -> str:
  if noise["ln"]:
    return "stratified_logit_normal" if noise["stratisfied"] else "logit_normal"
  return "mode" if noise["mode_scale"] else "uniform"
