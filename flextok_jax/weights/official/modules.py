"""The classes that an official configuration may name: their arguments, defaults and supported values.

A configuration consists of nested dictionaries, each with the name of a class under "_target_" (hydra's convention).
Such a dictionary is checked against these tables; no class is ever imported.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any, NamedTuple

from flextok_jax.core.literals import join, quote

MAX_SIZE = 65_536  # of widths and register counts
DTYPES = {
  "fp32": "float32",
  "float32": "float32",
  "bf16": "bfloat16",
  "bfloat16": "bfloat16",
  "fp16": "float16",
  "float16": "float16",
}


class Kind(NamedTuple):
  """The supported values of an argument: in words, and as a test of a plain value."""

  supported: str
  accepts: Callable[[Any], bool]


def integer(low: int, high: int) -> Kind:
  """A whole number from low to high."""
  return Kind(f"a whole number in [{low}, {high}]", lambda v: type(v) is int and low <= v <= high)


def number(low: float, high: float) -> Kind:
  """A finite number from low to high."""
  return Kind(f"a number in [{low:g}, {high:g}]", lambda v: type(v) in (int, float) and low <= v <= high)


def listed(kind: Kind, low: int, high: int) -> Kind:
  """A list of low to high values, each of the given kind."""
  supported = f"a list of {low if low == high else f'{low} to {high}'} values, each {kind.supported}"
  return Kind(supported, lambda v: type(v) is list and low <= len(v) <= high and all(map(kind.accepts, v)))


def exactly(*values: Any) -> Kind:
  """One of the values, of the same type."""
  supported = " or ".join(map(repr, values))
  return Kind(supported, lambda v: any(type(v) is type(value) and v == value for value in values))


def optional(kind: Kind) -> Kind:
  """None, or what the kind accepts."""
  return Kind(f"None or {kind.supported}", lambda v: v is None or kind.accepts(v))


def matching(pattern: str, supported: str) -> Kind:
  """Text that a regular expression matches in full."""
  return Kind(supported, lambda v: type(v) is str and re.fullmatch(pattern, v) is not None)


FLAG = Kind("True or False", lambda v: type(v) is bool)
TEXT = Kind("text of 1 to 200 characters", lambda v: type(v) is str and 0 < len(v) <= 200)
KEY = Kind(f"a key ({TEXT.supported})", TEXT.accepts)
KEYS = listed(KEY, 1, 8)
ENTRY = Kind("a dictionary", lambda v: type(v) is dict)
SIZE = integer(1, MAX_SIZE)
CHANNELS = integer(1, 1024)
SHARE = number(0, 1)
PATCH = Kind(
  "two equal whole numbers in [1, 64] (square patches)",
  lambda v: listed(integer(1, 64), 2, 2).accepts(v) and v[0] == v[1],
)
DTYPE = optional(exactly(*DTYPES))

# Per class: argument -> (kind,), or (kind, the constructor's default) if it may be left out. Arguments that affect only
# training are checked for their type and ignored.
Arguments = Mapping[str, tuple]

ACTIVATIONS = {
  f"torch.nn.{scope}{name}": name for scope in ("", "modules.activation.") for name in ("SiLU", "GELU", "ReLU")
}
FACTORIES: dict[str, Arguments] = {
  target: dict(approximate=(exactly("none", "tanh"), "none")) if name == "GELU" else {}
  for target, name in ACTIVATIONS.items()
}
GETTERS: dict[str, Arguments] = {
  name: dict(path=(exactly(*ACTIVATIONS),)) for name in ("hydra.utils.get_class", "hydra.utils.get_method")
}
NORMS: dict[str, Arguments] = {
  "flextok.model.layers.norm.Fp32LayerNorm": dict(
    bias=(FLAG, True), elementwise_affine=(exactly(False), True), eps=(exactly(1e-5), 1e-5)
  )
}
NORM = {"_target_": next(iter(NORMS)), "_partial_": True, "bias": False, "elementwise_affine": False}
OPERATIONS: dict[str, Arguments] = {
  f"flextok.model.utils.dict_ops.channels_{order}": {} for order in ("first_to_last", "last_to_first")
}
SUMS: dict[str, Arguments] = {"flextok.model.utils.dict_ops.sum_tensors": {}}

_HEAD = dict(
  read_key=(KEY,),
  write_key=(KEY,),
  dim=(SIZE,),
  use_mup_readout=(FLAG,),
  weight_init_style=(TEXT, "zero"),
  norm_layer=(ENTRY, NORM),
  dtype_override=(DTYPE, None),
  adaLN_emb_read_key=(optional(KEY), None),
  adaLN_packing_fn_read_key=(exactly(None), None),
  adaLN_bias=(FLAG, True),
  proj_bias=(FLAG, True),
)

_PREPROCESSORS = "flextok.model.preprocessors."

MODULES: dict[str, Arguments] = {
  "flextok.flextok_wrapper.FlexTok": dict.fromkeys(
    ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline"), (ENTRY,)
  ),
  "flextok.vae_wrapper.StableDiffusionVAE": dict(
    images_read_key=(KEY,),
    vae_latents_read_key=(KEY,),
    vae_latents_write_key=(KEY,),
    images_reconst_write_key=(KEY,),
    vae_kl_loss_write_key=(optional(KEY), None),
    latent_channels=(CHANNELS, 16),
    scaling_factor=(optional(number(1e-6, 1e6)), None),
    dtype_override=(DTYPE, "fp32"),
    hf_hub_path=(optional(TEXT), None),
    sample_posterior=(FLAG, True),
    learnable_logvar=(FLAG, False),
    logvar_init=(number(-1e6, 1e6), 0.0),
    compile_encode_fn=(FLAG, False),
    force_vae_encode=(FLAG, True),
    frozen=(FLAG, False),
  ),
  "flextok.model.utils.wrappers.SequentialModuleDictWrapper": dict(module_dict=(ENTRY,)),
  "flextok.model.utils.dict_ops.PerSampleOp": dict(read_key=(KEY,), write_key=(KEY,), per_sample_op=(ENTRY,)),
  "flextok.model.utils.dict_ops.PerSampleReducer": dict(read_keys=(KEYS,), write_key=(KEY,), per_sample_op=(ENTRY,)),
  _PREPROCESSORS + "patching.PatchEmbedder": dict(
    input_tensor_list_read_key=(KEY,),
    patches_list_write_key=(KEY,),
    n_patches_write_key=(KEY,),
    patch_sizes=(PATCH,),
    channels_in=(CHANNELS,),
    dim=(SIZE, None),
    flatten_patches=(exactly(False), True),
    weight_init_style=(TEXT, "xavier"),
  ),
  "flextok.model.utils.posembs.PositionalEmbeddingAdder": dict(
    read_key=(KEY,),
    write_key=(KEY,),
    dim=(SIZE,),
    max_sizes=(listed(SIZE, 1, 2),),
    posemb_type=(exactly("sincos", "learnable_sum", "learnable_prod"), "sincos"),
    posemb_scaling=(exactly("absolute", "interpolate"), "absolute"),
    posemb_write_key=(optional(KEY), None),
  ),
  _PREPROCESSORS + "registers.Registers1D": dict(
    input_tensor_list_read_key=(KEY,),
    register_sizes_read_write_key=(KEY,),
    registers_write_key=(KEY,),
    dim=(SIZE,),
    n_min=(integer(0, MAX_SIZE),),
    n_max=(SIZE,),
    n_eval=(optional(SIZE), None),
    size_sampling_mode=(
      matching(r"uniform|powers_of_two|k=[\d-]{1,190}", "'uniform', 'powers_of_two' or 'k=1-2-4'"),
      "uniform",
    ),
    ordering_mode=(exactly("nested"), "nested"),
    extra_registers_write_key=(exactly(None), None),
    extra_registers_dim=(optional(SIZE), None),
  ),
  _PREPROCESSORS + "flex_seq_packing.BlockWiseSequencePacker": dict(
    input_list_read_keys=(KEYS,),
    packed_seq_write_key=(KEY,),
    block_mask_write_key=(KEY,),
    inner_packed_shapes_write_key=(KEY,),
    outer_packed_shapes_write_key=(KEY,),
    mask_mode=(exactly("full", "causal_last"), "full"),
    max_seq_len=(optional(integer(1, 2**31 - 1)), None),
    pad_to_multiple=(optional(integer(1, 2**31 - 1)), None),
    emb_packing_fn_write_key=(optional(KEY), None),
    per_subseq_embs=(FLAG, False),
    compile_block_mask=(FLAG, True),
    return_materialized_mask=(FLAG, False),
  ),
  "flextok.model.trunks.transformers.FlexTransformer": dict(
    input_seq_read_key=(KEY,),
    output_seq_write_key=(KEY,),
    dim=(SIZE, 768),
    depth=(integer(1, 1024), 12),
    head_dim=(SIZE, 64),
    mlp_ratio=(number(1e-3, 1024), 4.0),
    qkv_bias=(FLAG, False),
    proj_bias=(FLAG, False),
    mlp_bias=(FLAG, False),
    drop=(SHARE, 0.0),
    drop_path_rate=(SHARE, 0.0),
    act_layer=(ENTRY, {"_target_": "torch.nn.SiLU", "_partial_": True}),
    norm_layer=(ENTRY, NORM),
    gated_mlp=(FLAG, True),
    qk_norm=(FLAG, True),
    use_act_checkpoint=(FLAG, False),
    weight_init_style=(TEXT, "xavier"),
    zero_init_query_proj=(FLAG, False),
    block_mask_read_key=(optional(KEY), None),
    score_mod_read_key=(exactly(None), None),
    adaLN_emb_read_key=(optional(KEY), None),
    adaLN_packing_fn_read_key=(optional(KEY), None),
    adaLN_expansion=(integer(1, 16), 1),
    rope_forward_read_key=(exactly(None), None),
    intermediate_layer_write_key=(optional(KEY), None),
    intermediate_layers=(listed(integer(-1024, 1024), 0, 1024), []),
  ),
  "flextok.model.postprocessors.seq_unpacking.SequenceUnpacker": dict(
    packed_seq_read_key=(KEY,),
    inner_seq_write_keys=(KEYS,),
    inner_packed_shapes_read_key=(KEY,),
    outer_packed_shapes_read_key=(KEY,),
  ),
  "flextok.model.postprocessors.heads.LinearHead": _HEAD | dict(dim_out=(CHANNELS,)),
  "flextok.model.postprocessors.heads.ToPatchesLinearHead": _HEAD
  | dict(channels_out=(CHANNELS,), patch_sizes=(PATCH,)),
  _PREPROCESSORS + "linear.LinearLayer": dict(
    read_key=(KEY,),
    write_key=(KEY,),
    dim_in=(CHANNELS,),
    dim=(SIZE,),
    weight_init_style=(TEXT, "xavier"),
    dtype_override=(DTYPE, None),
    proj_bias=(FLAG, True),
  ),
  _PREPROCESSORS + "token_dropout.MaskedNestedDropout": dict(
    read_write_key=(KEY,),
    dim=(SIZE,),
    eval_keep_k_read_key=(KEY, "eval_keep_k"),
    train_keep_k_write_key=(optional(KEY), "train_keep_k"),
    size_sampling_mode=(exactly("uniform", "pow2", "uniform_pow2"), "uniform"),
  ),
  _PREPROCESSORS + "nullcond.LearnedNullCond": dict(
    read_write_key=(KEY,),
    dim=(SIZE,),
    eval_drop_flag_read_key=(exactly("eval_dropout_mask"), "eval_dropout_mask"),
    dropout_prob=(SHARE, 0.0),
    replace_with_single_token=(FLAG, False),
  ),
  _PREPROCESSORS + "nullcond.ZeroNullCond": dict(
    read_write_key=(KEY,),
    eval_drop_flag_read_key=(exactly("eval_dropout_mask"), "eval_dropout_mask"),
    dropout_prob=(SHARE, 0.0),
  ),
  _PREPROCESSORS + "time_embedding.TimestepEmbedder": dict(
    timesteps_read_key=(KEY,),
    time_embedding_write_key=(KEY,),
    dim=(SIZE,),
    frequency_embedding_size=(exactly(256), 256),
    weight_init_style=(TEXT, "xavier"),
    max_timestep=(number(1e-6, 1e9), 1000.0),
    temb_as_tokens=(exactly(False), False),
  ),
  "flextok.regularizers.quantize_fsq.FSQ": dict(
    latents_read_key=(KEY,),
    quants_write_key=(KEY,),
    tokens_write_key=(KEY,),
    levels=(listed(integer(2, 1000), 1, 31),),
    drop_quant_p=(SHARE, 0.0),
    corrupt_tokens_p=(SHARE, 0.0),
    min_corrupt_tokens_p=(optional(SHARE), None),
    apply_corrupt_tokens_p=(SHARE, 0.2),
    packed_call=(FLAG, True),
  ),
  "flextok.flow_matching.noise_modules.MinRFNoiseModule": dict(
    clean_images_read_key=(KEY,),
    noised_images_write_key=(KEY,),
    timesteps_write_key=(KEY,),
    sigmas_write_key=(KEY,),
    ln=(FLAG, True),
    stratisfied=(FLAG, False),
    mode_scale=(number(-1e3, 1e3), 0.0),
    noise_write_key=(KEY, "flow_noise"),
    noise_read_key=(optional(KEY), None),
  ),
  "flextok.flow_matching.pipelines.MinRFPipeline": dict(
    noise_read_key=(optional(KEY), None),
    target_sizes_read_key=(optional(KEY), None),
    latents_read_key=(optional(KEY), None),
    timesteps_read_key=(KEY, None),
    noised_images_read_key=(KEY, None),
    reconst_write_key=(KEY, None),
    out_channels=(optional(CHANNELS), None),
  ),
}
TARGETS = {target.rpartition(".")[2]: target for target in MODULES}  # class name -> value of _target_
MODULES["flextok.flextok_wrapper.FlexTokFromHub"] = MODULES[TARGETS["FlexTok"]]

_CONTROLS = {"_convert_": exactly("none", "partial", "object", "all"), "_recursive_": FLAG}


@dataclasses.dataclass(frozen=True)
class Module:
  """A checked entry: its path, the name of its class, and all arguments, with defaults filled in."""

  path: str
  name: str
  arguments: Mapping[str, Any]

  def __getitem__(self, argument: str) -> Any:
    return self.arguments[argument]

  def check(self, ok: bool, argument: str, supported: str):
    """Raises ValueError about an argument unless `ok`."""
    if not ok:
      raise ValueError(f"{self.path}.{argument} must be {supported}, got {quote(self[argument])}")


def read(entry: Any, path: str, targets: Mapping[str, Arguments], *, partial: bool = False) -> Module:
  """Checks one entry of a configuration.

  Args:
    entry: plain data, as literals.plain returns it.
    path: of the entry, for errors.
    targets: {supported _target_: its arguments}.
    partial: whether the entry must be a factory (_partial_: True) rather than an object.

  Raises:
    ValueError: one line with the path, the value and what is supported.
  """
  if type(entry) is not dict:
    raise ValueError(f"{path} must be a dictionary with a _target_, got {quote(entry)}")
  target = entry.get("_target_")
  if type(target) is not str or target not in targets:
    names = ", ".join(targets if len(targets) < 7 else [t.rpartition(".")[2] for t in targets])
    raise ValueError(f"{join(path, '_target_')} {quote(target)} is not supported here: only {names}")
  name, arguments = target.rpartition(".")[2], targets[target]
  given = {k: v for k, v in entry.items() if k not in ("_target_", "_partial_")}
  factory = entry.get("_partial_", False)
  if factory is not partial:
    raise ValueError(f"{join(path, '_partial_')} of {name} must be {partial}, got {quote(factory)}")
  for k, kind in _CONTROLS.items():
    if k in given and not kind.accepts(value := given.pop(k)):
      raise ValueError(f"{join(path, k)} must be {kind.supported}, got {quote(value)}")
  for k, value in given.items():
    if k not in arguments:
      raise ValueError(f"{join(path, k)} = {quote(value)}: {name} has no such argument, or none that is supported")
  filled = {}
  for k, (kind, *default) in arguments.items():
    if k not in given and not default:
      raise ValueError(f"{join(path, k)} is missing: {name} needs {kind.supported}")
    filled[k] = given[k] if k in given else default[0]
    if not kind.accepts(filled[k]):
      origin = "" if k in given else f" (the default of {name})"
      raise ValueError(f"{join(path, k)} must be {kind.supported}, got {quote(filled[k])}{origin}")
  return Module(path, name, filled)


def read_activation(entry: Any, path: str) -> str:
  """Returns the activation of an entry: "silu", "gelu", "gelu_tanh" or "relu"."""
  if type(entry) is dict and entry.get("_target_") in tuple(GETTERS):
    name, approximate = ACTIVATIONS[read(entry, path, GETTERS)["path"]], "none"
  else:
    module = read(entry, path, FACTORIES, partial=True)
    name, approximate = module.name, module.arguments.get("approximate", "none")
  return name.lower() + ("_tanh" if approximate == "tanh" else "")


def check_norm(module: Module):
  """Raises ValueError unless a module's norm_layer is a layer norm without parameters."""
  read(module["norm_layer"], f"{module.path}.norm_layer", NORMS, partial=True)
