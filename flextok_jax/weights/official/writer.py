"""An official tokenizer's configuration from our settings, named and ordered as the authors' code does it."""

from collections.abc import Mapping
import functools
import math
from typing import Any

from flextok_jax.core.literals import quote
from flextok_jax.weights.official.modules import MODULES, TARGETS

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


def field(config: Mapping[str, Any], name: str) -> Any:
  """Returns the field with a dotted name; ValueError if there is none."""
  value = config
  for part in name.split("."):
    try:
      value = value[part]
    except (KeyError, TypeError):
      raise ValueError(f"the configuration has no field {name}") from None
  return value


def mup_base_width(config: Mapping[str, Any]) -> int | None:
  """Returns the base width that both readout multipliers come from, or None where they are 1.

  Raises:
    ValueError: there is no such whole number.
  """
  bases = {}
  for half in ("encoder", "decoder"):
    multiplier, width = field(config, f"{half}.readout_multiplier"), field(config, f"{half}.width")
    if multiplier != 1:
      base = round(multiplier * width)
      if base < 1 or not math.isclose(base, multiplier * width, rel_tol=1e-6):
        raise ValueError(
          f"{half}.readout_multiplier must be a whole base width divided by width {width} to be written as an official "
          f"configuration, got {multiplier}"
        )
      bases[half] = base
  if len(set(bases.values())) > 1:
    raise ValueError(
      "encoder.readout_multiplier and decoder.readout_multiplier stand for different base widths of muP "
      f"({bases['encoder']}, {bases['decoder']}); an official configuration has one"
    )
  return next(iter(bases.values()), None)


def write(config: Mapping[str, Any]) -> dict[str, Any]:
  """See official_config.to_official."""
  get = functools.partial(field, config)
  for name, value in (("stage", "tokenizer"), ("vae.kind", "autoencoder_kl")):
    if get(name) != value:
      raise ValueError(f"{name} must be {value!r} to be written as an official configuration, got {get(name)!r}")
  ln, stratified = _choose(config, "flow.t_sampling", _T_SAMPLING)
  return _module(
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
      **_beyond(
        "StableDiffusionVAE",
        dtype_override=_choose(config, "vae.dtype", {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}),
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


def _module(name: str, **arguments: Any) -> dict[str, Any]:
  return {"_target_": TARGETS[name], **arguments}


def _beyond(name: str, **arguments: Any) -> dict[str, Any]:
  """Returns the arguments that differ from the constructor's defaults."""
  return {k: v for k, v in arguments.items() if v != MODULES[TARGETS[name]][k][1]}


def _choose(config: Mapping[str, Any], name: str, choices: Mapping[str, Any]) -> Any:
  """Returns what a field's value stands for."""
  value = field(config, name)
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {quote(value)}")
  return choices[value]


def _per_sample(read_key: str, write_key: str, order: str) -> dict[str, Any]:
  operation = {"_target_": f"flextok.model.utils.dict_ops.channels_{order}", "_partial_": True}
  return _module("PerSampleOp", read_key=read_key, write_key=write_key, per_sample_op=operation)


def _patches(config: Mapping[str, Any], half: str, latents: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the patch embedding and the positions of a half that reads `latents`."""
  get = lambda name: field(config, f"{half}.{name}")
  prefix = half[:3]
  grid = get("max_grid")
  if not grid:
    downscale = 2 ** (len(field(config, "vae.block_out_channels")) - 1)
    grid = field(config, "image_size") // downscale // get("patch_size")
  embed = _module(
    "PatchEmbedder",
    input_tensor_list_read_key=latents,
    patches_list_write_key=f"{prefix}_patches",
    n_patches_write_key=f"{prefix}_n_patches",
    patch_sizes=[get("patch_size")] * 2,
    channels_in=field(config, "vae.latent_channels"),
    dim=get("width"),
    flatten_patches=False,
  )
  positions = _module(
    "PositionalEmbeddingAdder",
    read_key=f"{prefix}_patches",
    write_key=f"{prefix}_patches",
    dim=get("width"),
    max_sizes=[grid, grid],
    posemb_type=get("posemb"),
    posemb_scaling=get("posemb_scaling"),
  )
  return embed, positions


def _trunk(
  config: Mapping[str, Any], half: str, registers: str, packer: Mapping[str, Any], transformer: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Returns packer, transformer and unpacker of a half, with further arguments of packer and transformer."""
  get = lambda name: field(config, f"{half}.{name}")
  prefix = half[:3]
  packer = _module(
    "BlockWiseSequencePacker",
    input_list_read_keys=[f"{prefix}_patches", registers],
    packed_seq_write_key=f"{prefix}_packed_seq",
    block_mask_write_key=f"{prefix}_sa_block_mask",
    inner_packed_shapes_write_key=f"{prefix}_ps_inner",
    outer_packed_shapes_write_key=f"{prefix}_ps_outer",
    pad_to_multiple=128,
    **packer,
  )
  transformer = _module(
    "FlexTransformer",
    input_seq_read_key=f"{prefix}_packed_seq",
    output_seq_write_key=f"{prefix}_packed_seq",
    dim=get("width"),
    depth=get("depth"),
    head_dim=get("head_dim"),
    block_mask_read_key=f"{prefix}_sa_block_mask",
    **transformer,
    **_beyond(
      "FlexTransformer",
      mlp_ratio=get("mlp_ratio"),
      qkv_bias=get("qkv_bias"),
      proj_bias=get("out_bias"),
      mlp_bias=get("mlp_bias"),
      act_layer=_choose(config, f"{half}.activation", _ACTIVATIONS),
      gated_mlp=get("gated_mlp"),
      qk_norm=get("qk_norm"),
    ),
  )
  unpacker = _module(
    "SequenceUnpacker",
    packed_seq_read_key=f"{prefix}_packed_seq",
    inner_seq_write_keys=[f"{prefix}_patches", f"{prefix}_registers"],
    inner_packed_shapes_read_key=f"{prefix}_ps_inner",
    outer_packed_shapes_read_key=f"{prefix}_ps_outer",
  )
  return packer, transformer, unpacker


def _encoder(config: Mapping[str, Any]) -> dict[str, Any]:
  get = lambda name: field(config, f"encoder.{name}")
  number = field(config, "tokens.num_registers")
  embed, positions = _patches(config, "encoder", "vae_latents_channels_last")
  packer, transformer, unpacker = _trunk(config, "encoder", "enc_registers", dict(mask_mode="causal_last"), {})
  return dict(
    enc_channels_to_last=_per_sample("vae_latents", "vae_latents_channels_last", "first_to_last"),
    enc_patch_emb=embed,
    enc_patches_posemb_module=positions,
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
    ),
    enc_seq_packer=packer,
    enc_transformer=transformer,
    enc_unpacker=unpacker,
    enc_to_latents=_module(
      "LinearHead",
      read_key="enc_registers",
      write_key="enc_latents",
      dim=get("width"),
      dim_out=len(field(config, "tokens.levels")),
      use_mup_readout=get("readout_multiplier") != 1,
      **_beyond("LinearHead", proj_bias=get("head_bias")),
    ),
  )


def _decoder(config: Mapping[str, Any]) -> dict[str, Any]:
  get = lambda name: field(config, f"decoder.{name}")
  width = get("width")
  per_segment = _choose(config, "decoder.modulation", {"per_segment": True, "shared": False})
  null = _choose(config, "decoder.null_condition", {"learned": False, "single": True, "zero": None})
  null_module = dict(
    read_write_key="dec_quants",
    eval_drop_flag_read_key="eval_dropout_mask",
    dropout_prob=field(config, "tokens.null_prob"),
  )
  embed, positions = _patches(config, "decoder", "vae_latents_noised_channels_last")
  packer, transformer, unpacker = _trunk(
    config,
    "decoder",
    "dec_quants",
    dict(mask_mode="full", emb_packing_fn_write_key="dec_emb_packing_fn", per_subseq_embs=per_segment),
    dict(
      adaLN_emb_read_key="dec_temb",
      adaLN_packing_fn_read_key="dec_emb_packing_fn",
      adaLN_expansion=2 if per_segment else 1,
    ),
  )
  return dict(
    dec_from_latents=_module(
      "LinearLayer",
      read_key="quants",
      write_key="dec_quants",
      dim_in=len(field(config, "tokens.levels")),
      dim=width,
      **_beyond("LinearLayer", proj_bias=get("code_bias")),
    ),
    dec_registers_posemb_module=_module(
      "PositionalEmbeddingAdder",
      read_key="dec_quants",
      write_key="dec_quants",
      dim=width,
      max_sizes=[field(config, "tokens.num_registers")],
      posemb_type="learnable_sum",
      posemb_scaling="absolute",
    ),
    dec_nested_dropout=_module(
      "MaskedNestedDropout",
      read_write_key="dec_quants",
      dim=width,
      eval_keep_k_read_key="eval_keep_k",
      train_keep_k_write_key="train_keep_k",
      size_sampling_mode=field(config, "tokens.nested_dropout"),
    ),
    dec_latent_dropout=_module("ZeroNullCond", **null_module)
    if null is None
    else _module("LearnedNullCond", **null_module, dim=width, replace_with_single_token=null),
    dec_noise_channels_to_last=_per_sample("vae_latents_noised", "vae_latents_noised_channels_last", "first_to_last"),
    dec_noise_patch_emb=embed,
    dec_patches_posemb_module=positions,
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
      channels_out=field(config, "vae.latent_channels"),
      patch_sizes=[get("patch_size")] * 2,
      use_mup_readout=get("readout_multiplier") != 1,
      **(dict(adaLN_emb_read_key="dec_temb") if get("head_modulation") else {}),
      **_beyond("ToPatchesLinearHead", adaLN_bias=get("head_modulation_bias"), proj_bias=get("head_bias")),
    ),
    dec_channels_to_first=_per_sample("vae_latents_reconst_channels_last", "vae_latents_reconst", "last_to_first"),
  )
