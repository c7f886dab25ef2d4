"""Converts the arguments of official modules to our settings of encoder and decoder."""

from collections.abc import Mapping
from typing import Any

from flextok_jax.weights.official.modules import Module, check_norm, read_activation

MAX_GRID = 4096  # side of a position table


def _read_common(half: Mapping[str, Module], mask_mode: str, mup_base_width: int | None) -> dict[str, Any]:
  """Returns the settings that encoder and decoder share."""
  transformer, head, positions = half["transformer"], half["head"], half["positions"]
  width, size = transformer["dim"], positions["max_sizes"]
  for module in half.values():
    if "dim" in module.arguments:
      module.check(module["dim"] == width, "dim", f"{width}, the width of {transformer.path}")
  transformer.check(width % transformer["head_dim"] == 0, "head_dim", f"a divisor of dim {width}")
  check_norm(transformer)
  check_norm(head)
  half["packer"].check(half["packer"]["mask_mode"] == mask_mode, "mask_mode", repr(mask_mode))
  sincos = positions["posemb_type"] == "sincos"
  positions.check(len(size) == 2 and max(size) <= MAX_GRID, "max_sizes", f"two whole numbers in [1, {MAX_GRID}]")
  square = size[0] == size[1]
  positions.check(square or sincos, "max_sizes", "two equal numbers for learned positions")
  transformer.check(width % 4 == 0 or not sincos, "dim", "a multiple of 4 for sin-cos positions")
  hidden = int(transformer["mlp_ratio"] * width)
  hidden = int(2 * hidden / 3) if transformer["gated_mlp"] else hidden
  transformer.check(hidden >= 1, "mlp_ratio", f"a ratio that leaves a hidden width of at least 1 at dim {width}")
  multiplier = 1.0
  if head["use_mup_readout"]:
    if mup_base_width is None:
      raise ValueError(
        f"{head.path}.use_mup_readout is True, and the file does not store muP's base width: pass mup_base_width=..."
      )
    multiplier = mup_base_width / width
  return dict(
    width=width,
    depth=transformer["depth"],
    head_dim=transformer["head_dim"],
    patch_size=half["patch_embed"]["patch_sizes"][0],
    mlp_ratio=float(transformer["mlp_ratio"]),
    gated_mlp=transformer["gated_mlp"],
    activation=read_activation(transformer["act_layer"], f"{transformer.path}.act_layer"),
    qk_norm=transformer["qk_norm"],
    qkv_bias=transformer["qkv_bias"],
    out_bias=transformer["proj_bias"],
    mlp_bias=transformer["mlp_bias"],
    posemb=positions["posemb_type"] if square else "sincos_released",
    posemb_scaling=positions["posemb_scaling"],
    max_grid=size[0],
    max_grid_width=0 if square else size[1],
    head_bias=head["proj_bias"],
    readout_multiplier=multiplier,
  )


def read_encoder(encoder: Mapping[str, Module], mup_base_width: int | None) -> dict[str, Any]:
  """Returns our settings of the encoder from {role: module}; raises ValueError for unsupported arguments."""
  transformer = encoder["transformer"]
  for module, argument in (
    (transformer, "adaLN_emb_read_key"),
    (transformer, "adaLN_packing_fn_read_key"),
    (encoder["head"], "adaLN_emb_read_key"),
  ):
    module.check(module[argument] is None, argument, "None: no modulation in the encoder")
  if "registers" not in encoder:
    return _read_common(encoder, "full", mup_base_width)
  registers = encoder["registers"]
  registers.check(registers["n_min"] <= registers["n_max"], "n_min", f"at most n_max, {registers['n_max']}")
  registers.check(registers["n_eval"] in (None, registers["n_max"]), "n_eval", f"None or n_max, {registers['n_max']}")
  return _read_common(encoder, "causal_last", mup_base_width)


def read_decoder(decoder: Mapping[str, Module], num_registers: int, mup_base_width: int | None) -> dict[str, Any]:
  """Returns our settings of the decoder from {role: module}; raises ValueError for unsupported arguments.

  Args:
    decoder: {role: module}.
    num_registers: of the encoder; 0 for tokens on a grid.
    mup_base_width: see from_official.
  """
  transformer, packer, head, null = (decoder[k] for k in ("transformer", "packer", "head", "null_condition"))
  settings = _read_common(decoder, "full", mup_base_width)
  per_segment = packer["per_subseq_embs"]
  transformer.check(
    transformer["adaLN_expansion"] == (2 if per_segment else 1),
    "adaLN_expansion",
    "2 beside per_subseq_embs=True of the packer, 1 beside per_subseq_embs=False",
  )
  if num_registers:
    positions = decoder["register_positions"]
    positions.check(positions["max_sizes"] == [num_registers], "max_sizes", f"[{num_registers}], the encoder's n_max")
    learned = positions["posemb_type"] != "sincos"
    positions.check(learned, "posemb_type", "'learnable_sum' or 'learnable_prod' for registers")
    positions.check(positions["posemb_scaling"] == "absolute", "posemb_scaling", "'absolute' for registers")
  else:
    packer.check(not per_segment, "per_subseq_embs", "False for tokens on a grid")
  patch = decoder["patch_embed"]["patch_sizes"]
  head.check(head["patch_sizes"] == patch, "patch_sizes", f"{patch}, those of {decoder['patch_embed'].path}")
  if null.name == "ZeroNullCond":
    null_condition = "zero"
  else:
    single = null["replace_with_single_token"]
    null.check(not single or num_registers > 0, "replace_with_single_token", "False for tokens on a grid")
    null_condition = "single" if single else "learned"
  return settings | dict(
    modulation="per_segment" if per_segment else "shared",
    head_modulation=head["adaLN_emb_read_key"] is not None,
    head_modulation_bias=head["adaLN_bias"],
    code_bias=decoder["code_embed"]["proj_bias"],
    max_timestep=float(decoder["time_embed"]["max_timestep"]),
    null_condition=null_condition,
  )
