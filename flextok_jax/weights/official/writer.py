"""Writes the configuration of an official tokenizer, with the names and order of the authors' code."""

from collections.abc import Mapping
import functools
import math
from typing import Any

from flextok_jax.core.literals import quote
from flextok_jax.weights.official.modules import MODULES, SUMS, TARGETS
from flextok_jax.weights.official.tokenizer import from_official

_ACTIVATIONS = {
  "silu": {"_target_": "torch.nn.SiLU", "_partial_": True},
  "gelu": {"_target_": "torch.nn.GELU", "_partial_": True},
  "gelu_tanh": {"_target_": "torch.nn.GELU", "_partial_": True, "approximate": "tanh"},
  "relu": {"_target_": "torch.nn.ReLU", "_partial_": True},
}
_T_SAMPLING = {  # (ln, stratisfied)
  "logit_normal": (True, False),
  "stratified_logit_normal": (True, True),
  "uniform": (False, False),
  "mode": (False, False),
}


def to_official(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns an official tokenizer's configuration, with the module names of DEFAULT_ROLES in the authors' order.

  Fields that affect only training or sampling (flow.t_shift, tokens.saturation_weight, sampler, dtype) are left out.
  Arguments at their constructor's default are left out unless the authors write them. A readout_multiplier other than 1
  becomes use_mup_readout=True, without the base width, which is readout_multiplier * width. The newest official code
  refuses the classes of activations other than SiLU.

  Args:
    config: a ConfigDict (or nested dict) of stage "tokenizer". max_grid 0 becomes that of image_size.

  Returns:
    plain data that from_official reads as the same settings: the str() of each top-level value belongs in a safetensors
    header; JSON, without the top-level _target_, in a hub repository.

  Raises:
    ValueError: the format does not support a value, or no model can have it; the line names the field.
  """
  get = functools.partial(_field, config)
  if get("stage") == "distill":
    raise ValueError("a student (stage 'distill') cannot be written as an official one: export its teacher")
  for name, value in (("stage", "tokenizer"), ("vae.kind", "autoencoder_kl")):
    if get(name) != value:
      raise ValueError(f"{name} must be {value!r} to be written as an official configuration, got {get(name)!r}")
  grid = _choose("tokens.layout", get("tokens.layout"), {"registers": False, "grid": True})
  if grid and get("decoder.patch_size") != get("encoder.patch_size"):
    raise ValueError(
      f"decoder.patch_size must be {get('encoder.patch_size')}, that of the encoder, for tokens on a grid to be "
      f"written as an official configuration, got {get('decoder.patch_size')}"
    )
  if get("flow.base_size"):
    raise ValueError(
      "an official configuration cannot express times that depend on the size: flow.base_size must be 0, got "
      f"{get('flow.base_size')}"
    )
  ln, stratified = _choose("flow.t_sampling", get("flow.t_sampling"), _T_SAMPLING)
  official = _module(
    "FlexTok",
    vae=_module(
      "StableDiffusionVAE",
      images_read_key="rgb",
      vae_latents_read_key="vae_latents_reconst",
      vae_latents_write_key="vae_latents",
      images_reconst_write_key="rgb_reconst",
      latent_channels=get("vae.latent_channels"),
      scaling_factor=get("vae.scaling_factor"),
      sample_posterior=get("vae.sample_posterior"),
      frozen=True,
      **_non_default(
        "StableDiffusionVAE",
        dtype_override=_choose(
          "vae.dtype", get("vae.dtype"), {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        ),
      ),
    ),
    encoder=_module("SequentialModuleDictWrapper", module_dict=_encoder(config)),
    decoder=_module("SequentialModuleDictWrapper", module_dict=_decoder(config)),
    regularizer=_module(
      "FSQ",
      latents_read_key="enc_latents",
      quants_write_key="quants",
      tokens_write_key="tokens",
      levels=list(get("tokens.levels")),
      drop_quant_p=0.0,
      **_non_default("FSQ", packed_call=not grid),
    ),
    flow_matching_noise_module=_module(
      "MinRFNoiseModule",
      clean_images_read_key="vae_latents",
      noised_images_write_key="vae_latents_noised",
      timesteps_write_key="timesteps",
      sigmas_write_key="sigmas",
      ln=ln,
      stratisfied=stratified,
      mode_scale=0.0 if get("flow.t_sampling") == "uniform" else get("flow.mode_scale"),
    ),
    pipeline=_module(
      "MinRFPipeline",
      _partial_=True,
      target_sizes_read_key="vae_latents_sizes",
      latents_read_key="quants",
      timesteps_read_key="timesteps",
      noised_images_read_key="vae_latents_noised",
      reconst_write_key="vae_latents_reconst",
      out_channels=get("vae.latent_channels"),
    ),
  )
  multipliers = {half: _field(config, f"{half}.readout_multiplier") for half in ("encoder", "decoder")}
  widths = {half: _field(config, f"{half}.width") for half in multipliers}
  from_official(official, mup_base_width=_mup_base_width(multipliers, widths))
  return official


def _field(config: Mapping[str, Any], name: str) -> Any:
  """Returns the field with a dotted name; raises ValueError if there is none."""
  value = config
  for part in name.split("."):
    try:
      value = value[part]
    except (KeyError, TypeError):
      raise ValueError(f"the configuration has no field {name}") from None
  return value


def _mup_base_width(multipliers: Mapping[str, float], widths: Mapping[str, int]) -> int | None:
  """Returns the base width of muP for the readout multipliers of both halves, or None if they are 1.

  Raises:
    ValueError: there is no such whole number.
  """
  bases = {}
  for half, multiplier in multipliers.items():
    if multiplier != 1:
      base = round(multiplier * widths[half])
      if base < 1 or not math.isclose(base, multiplier * widths[half], rel_tol=1e-6):
        raise ValueError(
          f"{half}.readout_multiplier must be a whole base width divided by width {widths[half]} to be written as an "
          f"official configuration, got {multiplier}"
        )
      bases[half] = base
  if len(set(bases.values())) > 1:
    raise ValueError(
      "encoder.readout_multiplier and decoder.readout_multiplier imply different base widths of muP "
      f"({bases['encoder']}, {bases['decoder']}); an official configuration has one"
    )
  return next(iter(bases.values()), None)


def _module(name: str, **arguments: Any) -> dict[str, Any]:
  return {"_target_": TARGETS[name], **arguments}


def _non_default(name: str, **arguments: Any) -> dict[str, Any]:
  """Returns the arguments that differ from the constructor's defaults."""
  return {k: v for k, v in arguments.items() if v != MODULES[TARGETS[name]][k][1]}


def _choose(name: str, value: Any, choices: Mapping[str, Any]) -> Any:
  """Returns the choice that a field's value names."""
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {quote(value)}")
  return choices[value]


def _per_sample(read_key: str, write_key: str, order: str) -> dict[str, Any]:
  operation = {"_target_": f"flextok.model.utils.dict_ops.channels_{order}", "_partial_": True}
  return _module("PerSampleOp", read_key=read_key, write_key=write_key, per_sample_op=operation)


def _shared(
  config: Mapping[str, Any],
  half: str,
  latents_key: str,
  packed_keys: list[str],
  packer: Mapping[str, Any],
  transformer: Mapping[str, Any],
) -> tuple[dict[str, Any], ...]:
  """Returns the modules that encoder and decoder share: patch embedding, positions, packer, transformer, unpacker.

  Args:
    config: of the tokenizer.
    half: "encoder" or "decoder".
    latents_key: of the latents that become patches.
    packed_keys: of the patches and of the registers that follow them.
    packer: further arguments of the packer.
    transformer: further arguments of the transformer.
  """
  get = lambda name: _field(config, f"{half}.{name}")
  prefix = half[:3]
  grid = get("max_grid")
  if not grid:
    downscale = 2 ** (len(_field(config, "vae.block_out_channels")) - 1)
    grid = _field(config, "image_size") // downscale // get("patch_size")
  columns = get("max_grid_width") or grid
  if columns != grid and get("posemb") == "sincos":
    raise ValueError(
      f"{half}.max_grid_width must be {grid}, {half}.max_grid: the official format has another table of {grid} x "
      f"{columns} positions ('sincos_released')"
    )
  return (
    _module(
      "PatchEmbedder",
      input_tensor_list_read_key=latents_key,
      patches_list_write_key=f"{prefix}_patches",
      n_patches_write_key=f"{prefix}_n_patches",
      patch_sizes=[get("patch_size")] * 2,
      channels_in=_field(config, "vae.latent_channels"),
      dim=get("width"),
      flatten_patches=False,
    ),
    _module(
      "PositionalEmbeddingAdder",
      read_key=f"{prefix}_patches",
      write_key=f"{prefix}_patches",
      dim=get("width"),
      max_sizes=[grid, columns],
      posemb_type="sincos" if get("posemb") == "sincos_released" else get("posemb"),
      posemb_scaling=get("posemb_scaling"),
    ),
    _module(
      "BlockWiseSequencePacker",
      input_list_read_keys=packed_keys,
      packed_seq_write_key=f"{prefix}_packed_seq",
      block_mask_write_key=f"{prefix}_sa_block_mask",
      inner_packed_shapes_write_key=f"{prefix}_ps_inner",
      outer_packed_shapes_write_key=f"{prefix}_ps_outer",
      pad_to_multiple=128,
      **packer,
    ),
    _module(
      "FlexTransformer",
      input_seq_read_key=f"{prefix}_packed_seq",
      output_seq_write_key=f"{prefix}_packed_seq",
      dim=get("width"),
      depth=get("depth"),
      head_dim=get("head_dim"),
      block_mask_read_key=f"{prefix}_sa_block_mask",
      **transformer,
      **_non_default(
        "FlexTransformer",
        mlp_ratio=get("mlp_ratio"),
        qkv_bias=get("qkv_bias"),
        proj_bias=get("out_bias"),
        mlp_bias=get("mlp_bias"),
        act_layer=_choose(f"{half}.activation", get("activation"), _ACTIVATIONS),
        gated_mlp=get("gated_mlp"),
        qk_norm=get("qk_norm"),
      ),
    ),
    _module(
      "SequenceUnpacker",
      packed_seq_read_key=f"{prefix}_packed_seq",
      inner_seq_write_keys=[f"{prefix}_patches", f"{prefix}_registers"][: len(packed_keys)],
      inner_packed_shapes_read_key=f"{prefix}_ps_inner",
      outer_packed_shapes_read_key=f"{prefix}_ps_outer",
    ),
  )


def _encoder(config: Mapping[str, Any]) -> dict[str, Any]:
  get = lambda name: _field(config, f"encoder.{name}")
  number, grid = _field(config, "tokens.num_registers"), _field(config, "tokens.layout") == "grid"
  packed = ["enc_patches"] if grid else ["enc_patches", "enc_registers"]
  mask = dict(mask_mode="full" if grid else "causal_last")
  embed, positions, packer, transformer, unpacker = _shared(
    config, "encoder", "vae_latents_channels_last", packed, mask, {}
  )
  registers = dict(
    enc_register_module=_module(
      "Registers1D",
      input_tensor_list_read_key="enc_patches",
      register_sizes_read_write_key="register_sizes",
      registers_write_key="enc_registers",
      dim=get("width"),
      n_min=number,
      n_max=number,
      size_sampling_mode="uniform",
      ordering_mode="nested",
    )
  )
  return dict(
    enc_channels_to_last=_per_sample("vae_latents", "vae_latents_channels_last", "first_to_last"),
    enc_patch_emb=embed,
    enc_patches_posemb_module=positions,
    **({} if grid else registers),
    enc_seq_packer=packer,
    enc_transformer=transformer,
    enc_unpacker=unpacker,
    enc_to_latents=_module(
      "LinearHead",
      read_key=packed[-1],
      write_key="enc_latents",
      dim=get("width"),
      dim_out=len(_field(config, "tokens.levels")),
      use_mup_readout=get("readout_multiplier") != 1,
      **_non_default("LinearHead", proj_bias=get("head_bias")),
    ),
  )


def _decoder(config: Mapping[str, Any]) -> dict[str, Any]:
  get = lambda name: _field(config, f"decoder.{name}")
  width, grid = get("width"), _field(config, "tokens.layout") == "grid"
  per_segment = _choose("decoder.modulation", get("modulation"), {"per_segment": True, "shared": False})
  _choose("tokens.mask", _field(config, "tokens.mask"), {"token": True})
  single_null_token = _choose(
    "decoder.null_condition", get("null_condition"), {"learned": False, "single": True, "zero": None}
  )
  null_module = dict(
    read_write_key="dec_quants",
    eval_drop_flag_read_key="eval_dropout_mask",
    dropout_prob=_field(config, "tokens.null_prob"),
  )
  embed, positions, packer, transformer, unpacker = _shared(
    config,
    "decoder",
    "vae_latents_noised_channels_last",
    ["dec_patches"] if grid else ["dec_patches", "dec_quants"],
    dict(mask_mode="full", emb_packing_fn_write_key="dec_emb_packing_fn", per_subseq_embs=per_segment),
    dict(
      adaLN_emb_read_key="dec_temb",
      adaLN_packing_fn_read_key="dec_emb_packing_fn",
      adaLN_expansion=2 if per_segment else 1,
    ),
  )
  registers = dict(
    dec_registers_posemb_module=_module(
      "PositionalEmbeddingAdder",
      read_key="dec_quants",
      write_key="dec_quants",
      dim=width,
      max_sizes=[_field(config, "tokens.num_registers")],
      posemb_type="learnable_sum",
      posemb_scaling="absolute",
    ),
    dec_nested_dropout=_module(
      "MaskedNestedDropout",
      read_write_key="dec_quants",
      dim=width,
      eval_keep_k_read_key="eval_keep_k",
      train_keep_k_write_key="train_keep_k",
      size_sampling_mode=_field(config, "tokens.nested_dropout"),
    ),
  )
  add = dict(
    dec_add_noise_and_latents=_module(
      "PerSampleReducer",
      read_keys=["dec_patches", "dec_quants"],
      write_key="dec_patches",
      per_sample_op={"_target_": next(iter(SUMS)), "_partial_": True},
    )
  )
  return dict(
    dec_from_latents=_module(
      "LinearLayer",
      read_key="quants",
      write_key="dec_quants",
      dim_in=len(_field(config, "tokens.levels")),
      dim=width,
      **_non_default("LinearLayer", proj_bias=get("code_bias")),
    ),
    **({} if grid else registers),
    dec_latent_dropout=_module("ZeroNullCond", **null_module)
    if single_null_token is None
    else _module("LearnedNullCond", **null_module, dim=width, replace_with_single_token=single_null_token),
    dec_noise_channels_to_last=_per_sample("vae_latents_noised", "vae_latents_noised_channels_last", "first_to_last"),
    dec_noise_patch_emb=embed,
    dec_patches_posemb_module=positions,
    **(add if grid else {}),
    dec_seq_packer=packer,
    dec_time_embedder=_module(
      "TimestepEmbedder",
      timesteps_read_key="timesteps",
      time_embedding_write_key="dec_temb",
      dim=width,
      frequency_embedding_size=256,
      max_timestep=get("max_timestep"),
    ),
    dec_transformer=transformer,
    dec_unpacker=unpacker,
    dec_to_patches=_module(
      "ToPatchesLinearHead",
      read_key="dec_patches",
      write_key="vae_latents_reconst_channels_last",
      dim=width,
      channels_out=_field(config, "vae.latent_channels"),
      patch_sizes=[get("patch_size")] * 2,
      use_mup_readout=get("readout_multiplier") != 1,
      **(dict(adaLN_emb_read_key="dec_temb") if get("head_modulation") else {}),
      **_non_default("ToPatchesLinearHead", adaLN_bias=get("head_modulation_bias"), proj_bias=get("head_bias")),
    ),
    dec_channels_to_first=_per_sample("vae_latents_reconst_channels_last", "vae_latents_reconst", "last_to_first"),
  )
