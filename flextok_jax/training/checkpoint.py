"""Checkpoints of a run (orbax), which workdir belongs to which config, and starting from other weights."""

import json
import os
from pathlib import Path

from absl import logging
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import orbax.checkpoint as ocp

from flextok_jax import files
from flextok_jax.training.state import TrainState

# Fields that a resumed run may change; all others make another run of it.
_FREE = ("train.", "eval.", "sampler.", "mesh.", "remat", "init_from")
_FREE_DATA = ("data.num_threads", "data.num_workers", "data.prefetch", "data.max_unreadable")
FREE_AR = ("ar.loss_chunk", "ar.guidance_scale", "ar.temperature", "ar.top_k", "ar.top_p")


def _flat(config: ConfigDict) -> dict:
  return flatten_dict(json.loads(config.to_json()), sep=".")


def check_workdir(workdir: str, config: ConfigDict):
  """Checks that no run of another config lives in the workdir.

  Raises:
    ValueError: naming the first field that differs.
  """
  if not os.path.exists(os.path.join(workdir, "config.json")):
    return
  old, new = _flat(read_config(workdir)), _flat(config)
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name) and not name.startswith(_FREE) and name not in _FREE_DATA + FREE_AR:
      raise ValueError(
          f"workdir {workdir} belongs to another config: {name} is {old.get(name)!r} there and {new.get(name)!r} "
          "here; use another --workdir"
      )


def claim_workdir(workdir: str, config: ConfigDict):
  """Makes the workdir the config's own: checks it and writes config.json."""
  check_workdir(workdir, config)
  files.write_file(Path(workdir) / "config.json", (config.to_json(indent=1) + "\n").encode())


def read_config(workdir: str) -> ConfigDict:
  """Returns the config that a workdir was made with."""
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path):
    raise FileNotFoundError(f"{workdir} is no workdir of a run: it has no config.json")
  with open(path, encoding="utf-8", errors="replace") as f:
    return parse_config(f.read(), path)


def _tuples(value):
  """JSON's lists as the tuples that configs have."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def parse_config(text: str, origin: str) -> ConfigDict:
  """Parses a config of ours from JSON; ValueError where it is none."""
  try:
    values = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise ValueError(f"the config in {origin} is not JSON: {e}") from None
  if not isinstance(values, dict) or "stage" not in values:
    raise ValueError(f"the config in {origin} does not name a stage: not a file of flextok_jax")
  try:
    return ConfigDict(_tuples(values)).lock()
  except Exception as e:  # names that a ConfigDict refuses
    raise ValueError(f"the config in {origin} is not one of flextok_jax: {e}") from None


def _items(state: TrainState) -> dict:
  return {k: v for k, v in vars(state).items() if k != "step" and v}  # orbax stores no empty tree


class Checkpoints:
  """The checkpoints of a workdir: asynchronous, atomic; the newest few are kept, and the multiples of keep_period."""

  def __init__(self, workdir: str, keep: int = 1, keep_period: int = 0):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_period or None)
    self._manager = ocp.CheckpointManager(os.path.abspath(os.path.join(workdir, "checkpoints")), options=options)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: TrainState):
    """Starts to save the state under its step; does nothing if that step is saved already."""
    step = int(state.step)
    if step == self._manager.latest_step():
      return
    args = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
    self._manager.save(step, args=ocp.args.Composite(**args))

  def restore(self, state: TrainState) -> TrainState:
    """Returns the newest checkpoint in the shapes, dtypes and shardings of an abstract state."""
    step = self._manager.latest_step()
    args = {k: ocp.args.StandardRestore(v) for k, v in _items(state).items()}
    restored = self._restore(step, args)
    return state.replace(step=jnp.int32(step), **{k: restored[k] for k in args})

  def restore_average(self, params: dict, frozen: dict) -> dict:
    """Returns the newest averaged parameters joined with the frozen ones, as abstract trees of both ask for."""
    items = {k: v for k, v in dict(ema=params, frozen=frozen).items() if v}
    restored = self._restore(
        self._manager.latest_step(), {k: ocp.args.StandardRestore(v) for k, v in items.items()}
    )
    return {k: v for name in items for k, v in restored[name].items()}

  def _restore(self, step: int, args: dict):
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as e:  # orbax and tensorstore raise many kinds for a damaged file
      folder = os.path.join(self._manager.directory, str(step))
      reason = str(e).strip().splitlines()
      raise ValueError(
          f"checkpoint {folder} cannot be read ({type(e).__name__}: {reason[0][:200] if reason else ''}); "
          "delete that folder to resume from the one before"
      ) from e

  def close(self):
    """Waits for what is being saved."""
    self._manager.close()


def check_params(params: dict, expected: dict, origin: str):
  """Raises ValueError naming the first array that is missing, unexpected or of another shape than expected."""
  have, want = flatten_dict(params, sep="/"), flatten_dict(expected, sep="/")
  for name in sorted(have.keys() | want.keys()):
    if name not in have:
      raise ValueError(f"{origin} lacks the array {name}, which its config asks for")
    if name not in want:
      raise ValueError(f"{origin} has an array {name} that its config does not ask for")
    if have[name].shape != want[name].shape:
      raise ValueError(f"{origin}: {name} has shape {have[name].shape}, its config asks for {want[name].shape}")


def warm_start(state: TrainState, given: dict, path: str) -> TrainState:
  """Replaces the top-level parts of a fresh state that the weights `given` hold; other trained parts stay random.

  `path` says where they come from.

  Raises:
    ValueError: when no part is shared, a frozen part is not there, or shapes differ.
  """
  parts = state.joined()
  shared = {k: v for k, v in given.items() if k in parts}
  missing = [k for k in state.frozen if k not in given]
  if missing or not shared:
    raise ValueError(f"init_from={path} holds {', '.join(given)}; needed: {', '.join(missing or parts)}")
  check_params(shared, {k: parts[k] for k in shared}, path)
  logging.info("starting from %s of %s", ", ".join(shared), path)
  parts |= shared
  params = {k: parts[k] for k in state.params}
  return state.replace(
      params=params, ema=jax.tree.map(jnp.copy, params), frozen={k: parts[k] for k in state.frozen}
  )
