"""Assigns the modules of an official configuration to roles, and checks that they are connected as ours are.

The official modules pass a dictionary along: each reads some of its keys and writes others. A module is recognised by
its class and its arguments, never by its name, and the order of the modules in a file does not matter.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

from flextok_jax.core.literals import join, quote
from flextok_jax.weights.official.modules import MODULES, OPERATIONS, SUMS, TARGETS, Module, read

LATENTS, LATENTS_LAST = "latents", "latents, channels last"
PATCHES, PLACED = "patches", "patches with positions"
REGISTERS, CODES, VELOCITY = "registers", "codes", "velocity"
EMBEDDED, SUMMED = "embedded codes", "patches with codes"
PACKED, MASK, INNER, OUTER = "packed sequence", "attention mask", "inner shapes", "outer shapes"
OUT, OUT_PATCHES, OUT_REGISTERS = "transformed sequence", "transformed patches", "transformed registers"
TIMES, TIME_EMBEDDING, PACKING = "times", "time embedding", "packing function"
KEPT, FLAGS = "numbers of kept tokens", "flags of the null condition"


@dataclasses.dataclass(frozen=True)
class Role:
  """A part of the encoder or decoder that exactly one module must fill.

  Attributes:
    name: of the role.
    classes: names of the classes that can fill it.
    reads: {argument with a key (or a list of keys): label of the value expected under the key (a set: any of these)}.
    writes: {argument with a key: label of the value written under the key}.
    plays: distinguishes the role from another of the same class.
    optional: arguments of `reads` that may be None.
  """

  name: str
  classes: tuple[str, ...]
  reads: Mapping[str, Any]
  writes: Mapping[str, Any]
  plays: Callable[[Module], bool] = lambda module: True
  optional: tuple[str, ...] = ()


def _to_last(module: Module) -> bool:
  operation = read(module["per_sample_op"], f"{module.path}.per_sample_op", OPERATIONS, partial=True)
  return operation.name == "channels_first_to_last"


def _sums(module: Module) -> bool:
  read(module["per_sample_op"], f"{module.path}.per_sample_op", SUMS, partial=True)
  return True


def _flat(module: Module) -> bool:
  return len(module["max_sizes"]) == 1


NULL_CLASSES = ("LearnedNullCond", "ZeroNullCond")
_PACKER_WRITES = dict(
  packed_seq_write_key=PACKED,
  block_mask_write_key=MASK,
  inner_packed_shapes_write_key=INNER,
  outer_packed_shapes_write_key=OUTER,
  emb_packing_fn_write_key=PACKING,
)
_TRANSFORMER_READS = dict(input_seq_read_key=PACKED, block_mask_read_key=MASK)
_TRANSFORMER_WRITES = dict(intermediate_layer_write_key="features", output_seq_write_key=OUT)
_TO_LAST = Role(
  "to_channels_last", ("PerSampleOp",), dict(read_key=LATENTS), dict(write_key=LATENTS_LAST), plays=_to_last
)
_PATCH_EMBED = Role(
  "patch_embed",
  ("PatchEmbedder",),
  dict(input_tensor_list_read_key=LATENTS_LAST),
  dict(patches_list_write_key=PATCHES, n_patches_write_key="numbers of patches"),
)
_POSITIONS_WRITES = dict(write_key=PLACED, posemb_write_key="table")
_UNPACKER = Role(
  "unpacker",
  ("SequenceUnpacker",),
  dict(packed_seq_read_key=OUT, inner_packed_shapes_read_key=INNER, outer_packed_shapes_read_key=OUTER),
  dict(inner_seq_write_keys=[OUT_PATCHES, OUT_REGISTERS]),
)

_CODE_EMBED = Role("code_embed", ("LinearLayer",), dict(read_key=CODES), dict(write_key=EMBEDDED))
_POSITIONS = Role("positions", ("PositionalEmbeddingAdder",), dict(read_key=PATCHES), _POSITIONS_WRITES)
_PATCH_POSITIONS = dataclasses.replace(_POSITIONS, plays=lambda module: not _flat(module))
_TRANSFORMER = Role("transformer", ("FlexTransformer",), _TRANSFORMER_READS, _TRANSFORMER_WRITES)
_TIME_EMBED = Role(
  "time_embed", ("TimestepEmbedder",), dict(timesteps_read_key=TIMES), dict(time_embedding_write_key=TIME_EMBEDDING)
)
_MODULATED_TRANSFORMER = dataclasses.replace(
  _TRANSFORMER, reads=_TRANSFORMER_READS | dict(adaLN_emb_read_key=TIME_EMBEDDING, adaLN_packing_fn_read_key=PACKING)
)
_TO_VELOCITY = (
  Role(
    "head",
    ("ToPatchesLinearHead",),
    dict(read_key=OUT_PATCHES, adaLN_emb_read_key=TIME_EMBEDDING),
    dict(write_key="velocity, channels last"),
    optional=("adaLN_emb_read_key",),
  ),
  Role(
    "to_channels_first",
    ("PerSampleOp",),
    dict(read_key="velocity, channels last"),
    dict(write_key=VELOCITY),
    plays=lambda module: not _to_last(module),
  ),
)

# In the order in which they run.
ENCODER = (
  _TO_LAST,
  _PATCH_EMBED,
  _POSITIONS,
  Role(
    "registers",
    ("Registers1D",),
    dict(input_tensor_list_read_key={LATENTS, LATENTS_LAST, PATCHES, PLACED}),  # to count the samples
    dict(register_sizes_read_write_key="numbers of registers", registers_write_key=REGISTERS),
  ),
  Role("packer", ("BlockWiseSequencePacker",), dict(input_list_read_keys=[PLACED, REGISTERS]), _PACKER_WRITES),
  _TRANSFORMER,
  _UNPACKER,
  Role("head", ("LinearHead",), dict(read_key=OUT_REGISTERS), dict(write_key=CODES)),
)
DECODER = (
  _CODE_EMBED,
  Role(
    "register_positions",
    ("PositionalEmbeddingAdder",),
    dict(read_key=EMBEDDED),
    dict(write_key="registers with positions", posemb_write_key="table"),
    plays=_flat,
  ),
  Role(
    "nested_dropout",
    ("MaskedNestedDropout",),
    dict(read_write_key="registers with positions", eval_keep_k_read_key=KEPT),
    dict(read_write_key="registers after nested dropout", train_keep_k_write_key="drawn numbers of kept tokens"),
  ),
  Role(
    "null_condition",
    NULL_CLASSES,
    dict(read_write_key="registers after nested dropout", eval_drop_flag_read_key=FLAGS),
    dict(read_write_key=REGISTERS),
  ),
  _TO_LAST,
  _PATCH_EMBED,
  _PATCH_POSITIONS,
  Role("packer", ("BlockWiseSequencePacker",), dict(input_list_read_keys=[PLACED, REGISTERS]), _PACKER_WRITES),
  _TIME_EMBED,
  _MODULATED_TRANSFORMER,
  _UNPACKER,
  *_TO_VELOCITY,
)
# Of tokens on a grid, without registers: codes are added to the patches.
_GRID_PACKER = Role("packer", ("BlockWiseSequencePacker",), dict(input_list_read_keys=[PLACED]), _PACKER_WRITES)
_GRID_UNPACKER = dataclasses.replace(_UNPACKER, writes=dict(inner_seq_write_keys=[OUT_PATCHES]))
GRID_ENCODER = (
  _TO_LAST,
  _PATCH_EMBED,
  _POSITIONS,
  _GRID_PACKER,
  _TRANSFORMER,
  _GRID_UNPACKER,
  Role("head", ("LinearHead",), dict(read_key=OUT_PATCHES), dict(write_key=CODES)),
)
GRID_DECODER = (
  _CODE_EMBED,
  Role(
    "null_condition",
    NULL_CLASSES,
    dict(read_write_key=EMBEDDED, eval_drop_flag_read_key=FLAGS),
    dict(read_write_key="codes after the null condition"),
  ),
  _TO_LAST,
  _PATCH_EMBED,
  _PATCH_POSITIONS,
  Role(
    "sum",
    ("PerSampleReducer",),
    dict(read_keys=[PLACED, "codes after the null condition"]),
    dict(write_key=SUMMED),
    plays=_sums,
  ),
  dataclasses.replace(_GRID_PACKER, reads=dict(input_list_read_keys=[SUMMED])),
  _TIME_EMBED,
  _MODULATED_TRANSFORMER,
  _GRID_UNPACKER,
  *_TO_VELOCITY,
)


def is_grid(decoder: Any) -> bool:
  """Whether a decoder's entry has the module that adds codes to patches."""
  modules = decoder.get("module_dict") if isinstance(decoder, dict) else None
  entries = modules.values() if isinstance(modules, dict) else ()
  return any(isinstance(entry, dict) and entry.get("_target_") == TARGETS["PerSampleReducer"] for entry in entries)


def read_half(entry: Any, path: str, roles: tuple[Role, ...]) -> dict[str, Module]:
  """Reads the encoder or the decoder; returns {role's name: module}.

  Raises:
    ValueError: a module that is not supported, a role without a module, or with more than one; the line names it.
  """
  wrapper = TARGETS["SequentialModuleDictWrapper"]
  entries = read(entry, path, {wrapper: MODULES[wrapper]})["module_dict"]
  targets = {TARGETS[name]: MODULES[TARGETS[name]] for role in roles for name in role.classes}
  path = f"{path}.module_dict"
  modules = []
  for name, value in entries.items():
    if not re.fullmatch(r"(?!_.*_$)[\w-]{1,100}", name):  # _target_ and the like are not names
      raise ValueError(f"{path}: a module's name must be of letters, digits, _ and -, got {quote(name)}")
    modules.append(read(value, join(path, name), targets))
  filled = {}
  for role in roles:
    players = [m for m in modules if m.name in role.classes and role.plays(m)]
    what = f"the {' or '.join(role.classes)} that plays {role.name!r}"
    if not players:
      raise ValueError(f"{path} lacks {what}")
    if len(players) > 1:
      names = ", ".join(m.path.rpartition(".")[2] for m in players)
      raise ValueError(f"{path}: only one module can be {what}, got {names[:200]}")
    filled[role.name] = players[0]
  for module in modules:
    if module not in filled.values():
      raise ValueError(f"{module.path}: no part for this {module.name} in the {path.partition('.')[0]}; remove it")
  return filled


def follow(roles: tuple[Role, ...], modules: Mapping[str, Module], start: Mapping[str, str]) -> dict[str, str]:
  """Follows the keys through the modules of one half.

  Args:
    roles: in the order in which they run.
    modules: as read_half returns them.
    start: {key: label of its value before the first module}.

  Returns:
    {key: label of its value after the last module}.

  Raises:
    ValueError: a module reads a key with another value, or none; the line names module and key.
  """
  state = dict(start)
  for role in roles:
    module = modules[role.name]
    for argument, expected in role.reads.items():
      keys = module[argument]
      if keys is None and argument in role.optional:
        continue
      if not isinstance(keys, list):
        keys, expected = [keys], [expected]
      if len(keys) != len(expected):
        module.check(False, argument, f"{len(expected)} keys ({' and '.join(expected)})")
      for key, label in zip(keys, expected):
        check_key(f"{module.path}.{argument}", key, label, state)
    for argument, label in role.writes.items():
      keys = module[argument]
      if not isinstance(keys, list):
        keys, label = [keys], [label]
      if len(keys) != len(label):
        module.check(False, argument, f"{len(label)} keys ({' and '.join(label)})")
      state.update((key, name) for key, name in zip(keys, label) if key is not None)
  return state


def check_key(path: str, key: str | None, expected: str | set[str], state: Mapping[str, str]):
  """Raises ValueError unless the key that the argument at `path` names holds an expected value."""
  expected = {expected} if isinstance(expected, str) else expected
  if key is None or state.get(key) not in expected:
    right = sorted(repr(k) for k, label in state.items() if label in expected)
    found = f"holds the {state[key]}" if key is not None and key in state else "is written by nothing before it"
    raise ValueError(
      f"{path}: key {quote(key)} {found}; needed: the {' or '.join(sorted(expected))}"
      f"{' (key ' + ', '.join(right)[:100] + ')' if right else ''}"
    )
