"""Parameters of a tokenizer with the names and layouts of official checkpoints."""

from flax.traverse_util import flatten_dict
import numpy as np

from flextok_jax.weights.official.tokenizer_names import DEFAULT_ROLES, entries


def to_official(params: dict) -> dict[str, np.ndarray]:
  """Returns our tree {"vae", "encoder", "decoder"} (any subset) as a flat dict, without fixed tables."""
  flat = flatten_dict(params, sep="/")
  shapes = {path: np.shape(x) for path, x in flat.items()}
  return {
    name: np.ascontiguousarray(entry.to_official(np.asarray(flat[entry.path]), i))
    for entry in entries(shapes, DEFAULT_ROLES)
    for i, name in enumerate(entry.names)
  }
