"""Starting a new run from the weights of another one."""

from collections.abc import Collection

from absl import logging
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp

from flextok_jax.training.state import TrainState


def check_params(params: dict, expected: dict, origin: str) -> None:
  """Raises ValueError naming the first array that is missing, unexpected or of another shape than expected."""
  have, want = flatten_dict(params, sep="/"), flatten_dict(expected, sep="/")
  for name in sorted(have.keys() | want.keys()):
    if name not in have:
      raise ValueError(f"{origin} lacks the array {name}, which its config asks for")
    if name not in want:
      raise ValueError(f"{origin} has an array {name} that its config does not ask for")
    if have[name].shape != want[name].shape:
      raise ValueError(f"{origin}: {name} has shape {have[name].shape}, its config asks for {want[name].shape}")


def warm_start(state: TrainState, weights: dict, path: str, loaded: Collection[str] = ()) -> TrainState:
  """Replaces the top-level parts of a new state that `weights` holds; other trained parts stay random.

  Args:
    state: of a new run.
    weights: parameters by top-level part; parts that the state lacks are ignored.
    path: the file they were read from, for messages.
    loaded: frozen parts of the state that have their weights already.

  Raises:
    ValueError: no part is shared, a frozen part is missing, or shapes differ.
  """
  parts = state.joined()
  shared = {name: tree for name, tree in weights.items() if name in parts}
  missing = [name for name in state.frozen if name not in weights and name not in loaded]
  if missing or not shared:
    raise ValueError(f"init_from={path} holds {', '.join(weights)}; needed: {', '.join(missing or parts)}")
  check_params(shared, {name: parts[name] for name in shared}, path)
  logging.info("starting from %s of %s", ", ".join(shared), path)
  parts |= shared
  params = {name: parts[name] for name in state.params}
  frozen = {name: parts[name] for name in state.frozen}
  return state.replace(params=params, ema=jax.tree.map(jnp.copy, params), frozen=frozen)
