"""Chooses the mesh of a run from an estimate of the memory that a device needs, before anything is allocated."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

from flax.core.meta import unbox
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.config import TOKENIZER_STAGES, with_fields
from flextok_jax.core import accelerators
from flextok_jax.models import layers
from flextok_jax.ops import attention, layout
from flextok_jax.parallel import processes, sharding
from flextok_jax.stages import make_stage
from flextok_jax.stages.tokenizer import bucket_rows
from flextok_jax.training import mup, optim
from flextok_jax.training.state import TrainState, init_state

_UPDATES = {"auto": (False, True), "on": (True,), "off": (False,)}  # mesh.shard_update: what may be chosen
_SHARE = 0.8  # of a device's memory that a chosen mesh may take by the estimate, which is that uncertain
_ACCUMULATE = (1, 2, 4, 8, 16, 32)  # numbers of parts of a batch that a remedy may propose


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes per device."""

  state: float  # parameters, optimizer state, average and frozen parts: exact
  gradients: float
  copies: float  # of parameters, gathered or in the compute dtype, and gradients that are not yet sharded
  activations: float

  @property
  def total(self) -> float:
    return self.state + self.gradients + self.copies + self.activations

  def __str__(self) -> str:
    parts = ", ".join(f"{field.name} {getattr(self, field.name) / 1e9:.1f}" for field in dataclasses.fields(self))
    return f"{self.total / 1e9:.1f} GB per device ({parts})"


@dataclasses.dataclass(frozen=True)
class Plan:
  """The mesh of a run.

  Attributes:
    axes: arguments of sharding.make_mesh.
    shard_update: see state.state_shardings.
    text: the mesh, and what it is estimated to need.
    problem: why it may not fit, with the setting that would; "": it does, or the memory is unknown.
    impossible: whether it cannot fit, as the state alone is larger than the memory.
    advice: a setting with which devices would compute less; "": none.
  """

  axes: dict[str, Any]
  shard_update: bool
  text: str
  problem: str = ""
  impossible: bool = False
  advice: str = ""


def choose(config: ConfigDict, devices: Sequence[jax.Device], memory: float | None = None) -> Plan:
  """Returns the mesh that config.mesh gives, or chooses where mesh.fsdp is 0.

  The smallest fsdp is chosen for which a training step takes at most 80% of a device's memory by the estimate, or else
  the one that takes the least. With mesh.shard_update "auto", optimizer state and average are sharded over "data" where
  the step fits at that fsdp with it only. The result depends on the config and on the devices' number and memory alone,
  and is the same in all processes, which must all call this.

  Args:
    config: of a run.
    devices: all devices of the run.
    memory: bytes of each; None: as accelerators.memory says. If that is unknown or infinite, fsdp is 1.

  Raises:
    ValueError: the mesh does not suit the devices.
  """
  given = {name: config.mesh[name] for name in (*sharding.AXES, "slices")}
  memory = processes.least(memory or accelerators.memory(devices[0]) or math.inf)
  choices = _fsdp_choices(given, len(devices))
  known = math.isfinite(memory)
  estimates = _Estimates(config, devices) if known else None
  options = [(size, shard) for size in choices for shard in _UPDATES[config.mesh.shard_update]]
  fsdp, shard = options[0]
  if estimates and len(options) > 1:
    total = lambda option: estimates.of({**given, "fsdp": option[0]}, option[1]).total
    fits = (option for option in options if total(option) <= _SHARE * memory)
    fsdp, shard = next(fits, None) or min(options, key=total)
  axes = {**given, "fsdp": fsdp}
  sizes = sharding.axis_sizes(axes["data"], fsdp, axes["tensor"], len(devices))
  text = ", ".join(f"{name} {size}" for name, size in zip(sharding.AXES, sizes))
  shard = shard and sizes[0] > 1
  text += ", update sharded over data" if shard else ""
  problem, impossible = "", False
  if estimates:
    needed = estimates.of(axes, shard)
    text += f": about {needed} of {memory / 1e9:.1f} GB"
    if needed.total > memory:
      remedy = _remedy(config, estimates, given, len(devices), memory)
      problem, impossible = f"out of memory expected with the mesh {text}: {remedy}", needed.state > memory
  return Plan(
    axes, shard, text, problem, impossible, _advice(config, layout.batch_parts(dict(zip(sharding.AXES, sizes))))
  )


def _advice(config: ConfigDict, parts: int) -> str:
  """Returns the setting with which each of the parts of a batch holds whole groups of rows, if it does not."""
  if config.stage not in TOKENIZER_STAGES or not config.fast:
    return ""
  size = config.data.global_batch // config.optim.accumulate_steps
  group, rows = bucket_rows(size, config.tokens.bucket_rows), size // parts
  if not rows or rows % group == 0:
    return ""
  return (
    f"each device has {rows} row{'s' * (rows > 1)}, but they run in groups of {group}, whose buckets are padded to "
    f"divide among the devices: with tokens.bucket_rows={bucket_rows(rows, group)} they divide"
  )


def _fsdp_choices(given: Mapping[str, int], count: int) -> list[int]:
  """Returns the values of fsdp that may be chosen, ascending: the given one, or those that divide the devices."""
  if given["fsdp"]:
    return [given["fsdp"]]
  if given["data"] != -1:
    return [-1]
  rest = count // (given["slices"] * max(given["tensor"], 1))
  if given["tensor"] == -1 or count % (given["slices"] * given["tensor"]):
    return [1]
  return [size for size in range(1, rest + 1) if rest % size == 0]


def _abstract_state(config: ConfigDict) -> TrainState:
  stage = make_stage(with_fields(config, {"attention": "xla"}))  # a kernel may not suit this process's own devices
  optimizer = optim.make_optimizer(config.optim, config.train.num_steps)
  return jax.eval_shape(lambda: init_state(stage, optimizer, jax.random.key(0)))


class _Estimates:
  """Estimates of a training step on different meshes, from shapes alone."""

  def __init__(self, config: ConfigDict, devices: Sequence[jax.Device]):
    self._config, self._count = config, len(devices)
    self._state = _abstract_state(config)
    part = config.ar if config.stage == "ar" else config.decoder
    arguments = config.attention, part.head_dim, config.dtype, devices[0]
    self._maps = lambda masked: attention.choose_implementation(*arguments, masked) == "xla"

  def of(self, mesh: Mapping[str, int], shard_update: bool, fields: Mapping[str, Any] | None = None) -> Estimate:
    """Returns the estimate of a mesh {axis: size, or -1}, with some fields of the config changed."""
    config = with_fields(self._config, fields) if fields else self._config
    given = (mesh["data"], mesh["fsdp"], mesh["tensor"])
    sizes = dict(zip(sharding.AXES, sharding.axis_sizes(*given, count=self._count)))
    stage, parts = make_stage(config), config.optim.accumulate_steps
    rows = config.data.global_batch / parts / (sizes["data"] * sizes["fsdp"])
    images = not (config.data.latents or config.data.trajectories)
    numbers = sum(jax.tree.leaves(sharding.part_sizes(self._state.params, sizes)))
    return Estimate(
      state=self._bytes(sizes, shard_update),
      gradients=4 * numbers * (2 if parts > 1 else 1),
      copies=self._copies(sizes),
      activations=stage.activation_bytes(rows, self._maps, images),
    )

  def _bytes(self, sizes: Mapping[str, int], shard_update: bool) -> float:
    """Returns the bytes of the state on a device."""

    def local(tree, over_data):
      numbers = jax.tree.leaves(sharding.part_sizes(tree, sizes, over_data))
      return sum(n * x.dtype.itemsize for n, x in zip(numbers, jax.tree.leaves(unbox(tree))))

    state = self._state
    return local((state.params, state.frozen), False) + local((state.ema, state.opt_state), shard_update)

  def _parameters(self, sizes: Mapping[str, int], params: Any) -> tuple[dict, dict]:
    """Returns ({path: numbers on a device} of the scanned blocks, the same of all other parameters)."""
    found: tuple[dict, dict] = {}, {}
    for path, size in jax.tree_util.tree_leaves_with_path(sharding.part_sizes(params, sizes)):
      found["blocks" not in mup.names_of(path)][path] = size
    return found

  def _copies(self, sizes: Mapping[str, int]) -> float:
    """Returns the bytes of parameters in the compute dtype, whole along "fsdp", and of their gradients.

    Of scanned blocks, two at a time; those of all others are alive for the whole step.
    """
    whole = {**sizes, "fsdp": 1}
    size = jnp.dtype(self._config.dtype).itemsize
    total = 0.0
    for params, each in ((self._state.params, 2 * size), (self._state.frozen, size)):
      scanned, single = self._parameters(whole, params)
      depths = {path: x.shape[0] for path, x in jax.tree_util.tree_leaves_with_path(unbox(params)) if x.ndim}
      total += each * (sum(single.values()) + sum(2 * n / depths[path] for path, n in scanned.items()))
    return total


def _remedy(config: ConfigDict, estimates: _Estimates, given: Mapping[str, int], count: int, memory: float) -> str:
  """Returns the settings nearest to those given that fit by the estimate."""
  explicit, shard = given["fsdp"] != 0 or given["data"] != -1, _UPDATES[config.mesh.shard_update][-1]
  meshes = [{**given, "data": -1, "fsdp": size} for size in _fsdp_choices({**given, "data": -1, "fsdp": 0}, count)]
  for fields in _milder(config):
    parts = fields.get("optim.accumulate_steps", 1) * count // max(given["tensor"], 1)
    if config.data.global_batch % parts:
      continue
    for mesh in [given, *meshes] if explicit else meshes:
      if estimates.of(mesh, shard, fields).total <= _SHARE * memory:
        changed = fields | ({"mesh.data": -1, "mesh.fsdp": mesh["fsdp"]} if explicit and mesh is not given else {})
        return "set " + " and ".join(f"{name}={value!r}" for name, value in changed.items())
  return "use more devices, or a smaller data.global_batch"


def _milder(config: ConfigDict) -> Iterator[dict[str, Any]]:
  """Yields changes of the config that save memory, the cheapest first."""
  policies = tuple(layers.REMATS)
  for remat in policies[policies.index(config.remat) :]:
    yield {} if remat == config.remat else {"remat": remat}
  strongest = {} if config.remat == "full" else {"remat": "full"}
  for parts in _ACCUMULATE:
    if parts > config.optim.accumulate_steps:
      yield {**strongest, "optim.accumulate_steps": parts}
