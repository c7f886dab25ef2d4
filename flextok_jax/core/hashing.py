"""A hash that identifies a model: its settings and its arrays."""

from collections.abc import Mapping
import hashlib
import json
from typing import Any

from flax.core.meta import unbox
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np


def hash_tree(settings: Mapping[str, Any], arrays: Any, *, exact: bool = False) -> str:
  """Returns 16 hex digits of the SHA-256 of settings and arrays.

  Arrays may be distributed over processes; then all processes call this together.

  Args:
    settings: JSON-serialisable values.
    arrays: a pytree of floating-point arrays, boxed with logical axes or not.
    exact: hashes the arrays as they are. False: rounded to bfloat16, so that the same weights in float32 and bfloat16
      have the same hash.
  """
  digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
  named = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), x)
    for path, x in jax.tree_util.tree_leaves_with_path(unbox(arrays))
  ]
  for path, x in sorted(named, key=lambda item: item[0]):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      x = multihost_utils.process_allgather(x, tiled=True)
    x = np.ascontiguousarray(np.asarray(x) if exact else np.asarray(x).astype(jnp.bfloat16))
    digest.update(f"\n{path} {list(x.shape)}\n".encode())
    digest.update(x.view(f"u{x.itemsize}").astype(f"<u{x.itemsize}").tobytes())
  return digest.hexdigest()[:16]
