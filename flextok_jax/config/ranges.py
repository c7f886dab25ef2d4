"""The values that each field of a config may have.

Fields without a range here are switches (True or False) and texts such as paths, which may be any. Conditions between
fields, such as a width that is a multiple of head_dim, are checked where the fields are used.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.config.defaults import get_config

TOKENIZER_STAGES = ("tokenizer", "distill")  # whose models have an encoder and a flow decoder
MAX_INT = 2**31 - 1  # of int32, in which devices count
MAX_FLOAT = 3e38  # about the largest float32
MAX_STEPS = 10_000  # of the sampler
# Of sampling: with these, logits and velocities stay finite in float32.
SCALES = (0.0, 1e6)  # of guidance
TEMPERATURES = (1e-6, 1e6)


class Range(NamedTuple):
  """What a value may be.

  Attributes:
    words: "the field must be ...".
    holds: whether a value is in the range; takes values of any type.
  """

  words: str
  holds: Callable[[Any], bool]


def whole(low: int, high: int = MAX_INT, or_else: int | None = None) -> Range:
  """Whole numbers from low to high, and `or_else`."""
  words = f"a whole number from {low} to {high}" + (f", or {or_else}" if or_else is not None else "")
  is_int = lambda x: isinstance(x, int) and not isinstance(x, bool)
  return Range(words, lambda x: is_int(x) and (low <= x <= high or x == or_else))


def number(words: str, holds: Callable[[float], bool]) -> Range:
  """Finite numbers with a property: number("above 0", lambda x: x > 0)."""
  is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= MAX_FLOAT
  return Range(f"a finite number {words}".strip(), lambda x: is_number(x) and holds(x))


def between(low: float, high: float) -> Range:
  """Numbers from low to high, both included."""
  return number(f"from {low:g} to {high:g}", lambda x: low <= x <= high)


def one_of(*names: str) -> Range:
  """One of the names."""
  return Range(f"one of {', '.join(names)}", lambda x: isinstance(x, str) and x in names)


def several(each: Range, words: str, holds: Callable[[Sequence], bool] = lambda x: True) -> Range:
  """A tuple of values of one range, with a property of the whole."""
  return Range(words, lambda x: isinstance(x, tuple | list) and all(map(each.holds, x)) and holds(x))


_TYPES = {
  bool: Range("True or False", lambda x: isinstance(x, bool)),
  str: Range("a text of at most 4096 characters", lambda x: isinstance(x, str) and len(x) <= 4096),
}  # of fields without a range
WIDTH = whole(1, 65_536)
DEPTH = whole(1, 1024)
COUNT = whole(1)
MAX_SIDE = 4096  # pixels of an image
MAX_GRID = 512  # patches per side; a table of 512 x 512 positions of width 1024 has 1 GiB
PATCHES = whole(0, MAX_GRID)
MAX_TILE = 65536  # pixels per side
FRACTION = between(0, 1)
BELOW_1 = number("in [0, 1)", lambda x: 0 <= x < 1)
POSITIVE = number("above 0", lambda x: x > 0)
NOT_NEGATIVE = number("of at least 0", lambda x: x >= 0)
FINITE = number("", lambda x: True)
DTYPE = one_of("bfloat16", "float16", "float32")
MESH_AXIS = whole(1, or_else=-1)
INTERVAL = several(FRACTION, "two times 0 <= low <= high <= 1", lambda x: len(x) == 2 and x[0] <= x[1])

_PART = {
  "width": WIDTH,
  "depth": DEPTH,
  "head_dim": WIDTH,
  "patch_size": whole(1, 4096),
  "mlp_ratio": number("above 0 and up to 1024", lambda x: 0 < x <= 1024),
  "activation": one_of("silu", "gelu", "gelu_tanh", "relu", "quick_gelu"),
  "posemb": one_of("sincos", "learnable_sum", "learnable_prod", "sincos_released"),
  "posemb_scaling": one_of("absolute", "interpolate", "scaled"),
  "max_grid": PATCHES,
  "max_grid_width": PATCHES,
  "readout_multiplier": POSITIVE,
}  # of encoder and decoder
_SAMPLER = {
  "num_steps": whole(1, MAX_STEPS),
  "guidance": one_of("apg", "cfg", "none"),
  "guidance_scale": between(*SCALES),
  "guidance_interval": INTERVAL,
  "apg_momentum": FINITE,
  "apg_eta": FINITE,
  "apg_threshold": NOT_NEGATIVE,
}
RANGES = {
  "stage": one_of("tokenizer", "vae", "ar", "distill"),
  "seed": whole(0, 2**32 - 1),  # more bits than a key of jax has without 64-bit numbers
  "image_size": whole(1, MAX_SIDE),
  "dtype": one_of("float32", "bfloat16"),  # sums of many terms can exceed float16
  "attention": one_of("auto", "xla", "cudnn", "pallas"),
  "remat": one_of("none", "dots", "full"),
  "profile_steps": several(COUNT, "() or two steps 1 <= start < stop", lambda x: not x or len(x) == 2 and x[0] < x[1]),
  "vae.kind": one_of("autoencoder_kl", "pixels"),
  "vae.latent_channels": whole(1, 1024),
  "vae.block_out_channels": several(WIDTH, "1 to 8 whole numbers from 1 to 65536", lambda x: 1 <= len(x) <= 8),
  "vae.layers_per_block": whole(1, 64),
  "vae.norm_groups": WIDTH,
  "vae.scaling_factor": NOT_NEGATIVE,
  "vae.dtype": DTYPE,
  "vae.tile": whole(0, MAX_TILE),
  **{f"{part}.{name}": kind for part in ("encoder", "decoder") for name, kind in _PART.items()},
  "decoder.modulation": one_of("per_segment", "shared"),
  "decoder.max_timestep": POSITIVE,
  "decoder.null_condition": one_of("learned", "zero", "single"),
  "tokens.layout": one_of("registers", "grid"),
  "tokens.num_registers": WIDTH,
  "tokens.levels": several(
    whole(2, 65_536),
    f"whole numbers of at least 2, with a product of at most {MAX_INT}",
    lambda x: len(x) >= 1 and math.prod(x) <= MAX_INT,
  ),
  "tokens.nested_dropout": one_of("uniform", "pow2", "uniform_pow2", "none"),
  "tokens.mask": one_of("token", "attention"),
  "tokens.saturation_weight": NOT_NEGATIVE,
  "tokens.bucket_rows": COUNT,
  "tokens.null_prob": FRACTION,
  "tokens.quantization_dropout": FRACTION,
  "tokens.corruption": FRACTION,
  "flow.t_sampling": one_of("logit_normal", "stratified_logit_normal", "uniform", "mode"),
  "flow.mode_scale": between(-1, 2 / (math.pi - 2)),  # where t(u) has no positive slope
  "flow.t_shift": POSITIVE,
  "flow.base_size": whole(0, MAX_SIDE),
  "repa.weight": NOT_NEGATIVE,
  "repa.block": DEPTH,
  "repa.hidden": WIDTH,
  "repa.features": WIDTH,
  "repa.grid": PATCHES,
  "repa.dtype": DTYPE,
  **{f"{section}.{name}": kind for section in ("sampler", "distill.sampler") for name, kind in _SAMPLER.items()},
  "distill.steps": several(
    whole(1, 64), "1 to 8 whole numbers from 1 to 64, each once", lambda x: 1 <= len(x) <= 8 and len(set(x)) == len(x)
  ),
  "ar.width": WIDTH,
  "ar.depth": DEPTH,
  "ar.head_dim": WIDTH,
  "ar.num_ids": whole(1, MAX_INT - 1),  # one more with ar.stop
  "ar.num_tokens": WIDTH,
  "ar.condition": one_of("class", "text", "none"),
  "ar.num_classes": COUNT,
  "ar.norm": one_of("rmsnorm", "layernorm"),
  "ar.norm_eps": FRACTION,
  "ar.qk_norm": one_of("rmsnorm", "layernorm", "none"),
  "ar.qk_norm_eps": FRACTION,
  "ar.ffn": one_of("swiglu", "mlp_gelu"),
  "ar.mlp_ratio": _PART["mlp_ratio"],
  "ar.ffn_multiple_of": WIDTH,
  "ar.pos_embed": one_of("absolute", "sincos1d"),
  "ar.readout_multiplier": POSITIVE,
  "ar.drop_condition": BELOW_1,
  "ar.class_names": several(_TYPES[str], "a tuple of texts"),
  "ar.position_decay": FINITE,
  "ar.loss_chunk": COUNT,
  "ar.guidance_scale": between(*SCALES),
  "ar.temperature": between(*TEMPERATURES),
  "ar.top_k": whole(0),
  "ar.top_p": FRACTION,
  "text.encoder": one_of("t5", "bytes"),
  "text.max_length": WIDTH,
  "text.features": WIDTH,
  "text.mlp_hidden": WIDTH,
  "text.depth": DEPTH,
  "text.head_dim": WIDTH,
  "text.ngram_rows": whole(0, MAX_INT),
  "vae_loss.l1_weight": NOT_NEGATIVE,
  "vae_loss.l2_weight": NOT_NEGATIVE,
  "vae_loss.kl_weight": NOT_NEGATIVE,
  "vae_loss.detail_weight": NOT_NEGATIVE,
  "vae_loss.lpips_weight": NOT_NEGATIVE,
  "discriminator.weight": NOT_NEGATIVE,
  "discriminator.start_step": whole(0),
  "discriminator.channels": WIDTH,
  "discriminator.num_layers": whole(1, 16),
  "data.global_batch": COUNT,
  "data.crop": one_of("random", "center"),
  "data.crop_min_area": number("above 0 and up to 1", lambda x: 0 < x <= 1),
  "data.shapes": several(
    several(whole(1, MAX_SIDE), "", lambda x: len(x) == 2),
    f"different pairs (height, width) of whole numbers from 1 to {MAX_SIDE}",
    lambda x: len(set(map(tuple, x))) == len(x),
  ),
  "data.shape_weights": several(POSITIVE, "a tuple of finite numbers above 0"),
  "data.num_threads": whole(1, 1024),
  "data.num_workers": whole(0, 1024),
  "data.prefetch": whole(0, 1024),
  "data.max_unreadable": FRACTION,
  "data.sources.synthetic.render_size": whole(1, 4096),
  "data.sources.synthetic.style": one_of("scenes", "plain"),
  "data.sources.emoji.centered": FRACTION,
  "data.sources.photos.min_crop": COUNT,
  **{f"data.sources.{name}.weight": NOT_NEGATIVE for name in get_config().data.sources},
  "optim.name": one_of("adamw", "muon"),
  "optim.learning_rate": POSITIVE,
  "optim.mup_base_width": whole(0, 65_536),
  "optim.end_learning_rate": NOT_NEGATIVE,
  "optim.warmup_steps": whole(0),
  "optim.b1": BELOW_1,
  "optim.b2": BELOW_1,
  "optim.eps": POSITIVE,
  "optim.weight_decay": NOT_NEGATIVE,
  "optim.clip_norm": POSITIVE,
  "optim.accumulate_steps": COUNT,
  "optim.ema_decay": BELOW_1,
  "optim.rates.encoder": POSITIVE,
  "optim.rates.decoder": POSITIVE,
  "optim.discriminator.learning_rate": POSITIVE,
  "optim.discriminator.b1": BELOW_1,
  "optim.discriminator.b2": BELOW_1,
  "optim.discriminator.eps": POSITIVE,
  "optim.discriminator.clip_norm": POSITIVE,
  "lora.rank": whole(0, 65_536),
  "lora.alpha": POSITIVE,
  "lora.parts": several(_TYPES[str], "a tuple of names of parts"),
  "train.num_steps": COUNT,
  "train.parts": several(_TYPES[str], "a tuple of names of parts"),
  "train.log_every": COUNT,
  "train.checkpoint_every": COUNT,
  "train.keep_checkpoints": COUNT,
  "train.keep_period": whole(0),
  "train.eval_every": COUNT,
  "train.export_dtype": DTYPE,
  "train.wandb": Range(
    "a project's name of at most 128 characters without any of / \\ # ? % :, or empty",
    lambda x: isinstance(x, str) and len(x) <= 128 and not set(x) & set("/\\#?%:"),
  ),
  "eval.sources": several(
    one_of(*get_config().data.sources), f"a tuple of names of {', '.join(get_config().data.sources)}"
  ),
  "eval.num_images": COUNT,
  "eval.batch_size": COUNT,
  "eval.num_tokens": several(WIDTH, "a tuple of whole numbers from 1 to tokens.num_registers"),
  "eval.grid_images": COUNT,
  "mesh.data": MESH_AXIS,
  "mesh.fsdp": whole(0, or_else=-1),
  "mesh.tensor": MESH_AXIS,
  "mesh.slices": COUNT,
  "mesh.shard_update": one_of("auto", "on", "off"),
}


def flat(section: Mapping[str, Any], path: str = "") -> dict[str, Any]:
  """Returns {dotted name: value} of nested mappings, such as a config."""
  found: dict[str, Any] = {}
  for name, value in section.items():
    found |= flat(value, f"{path}{name}.") if isinstance(value, Mapping | ConfigDict) else {f"{path}{name}": value}
  return found


# Only switches and texts may do without an entry in RANGES.
_RANGES = {name: RANGES.get(name) or _TYPES[type(value)] for name, value in flat(get_config()).items()}


def check_field(name: str, value: Any) -> None:
  """Raises ValueError for a dotted name of no field, or for a value out of its range; the line states the range."""
  if name not in _RANGES:
    if any(known.startswith(f"{name}.") for known in _RANGES):
      raise ValueError(f"{name} must be a group of fields, got {value!r:.80}")
    raise ValueError(f"unknown field {name!r:.80}: flextok_jax/config/defaults.py lists all fields")
  if not _RANGES[name].holds(value):
    raise ValueError(f"{name} must be {_RANGES[name].words}, got {value!r:.80}")


def check(config: Mapping[str, Any]) -> None:
  """Raises ValueError for the first field of a config that is missing, does not exist or is out of its range."""
  fields = flat(config)
  for name, value in fields.items():
    check_field(name, value)
  for name in _RANGES.keys() - fields.keys():
    raise ValueError(f"the field {name} is missing: start from flextok_jax.config.derive()")


def float_dtype(name: str, value: Any) -> np.dtype:
  """Returns the floating-point type that the argument `name` names; raises ValueError for any other value."""
  try:
    dtype = jnp.dtype(value)
  except TypeError:
    dtype = None
  known = RANGES.get(name, DTYPE)
  if dtype is None or not known.holds(dtype.name):
    raise ValueError(f"{name} must be {known.words}, got {value!r:.80}")
  return dtype
