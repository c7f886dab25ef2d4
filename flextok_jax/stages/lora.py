"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank additions to the matrices of attention and MLP blocks.

A matrix W [in, out] of a frozen part becomes W + alpha / rank * down up, with down [in, rank] and up [rank, out]. What
is fused in one array (queries, keys and values) shares one `down`. In training the product
with x is computed as (x down) up, so that no gradient of the size of W exists.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp

from flextok_jax.models.layers import LORA_DOWN, LORA_UP

Params = Any

PART = "lora"  # top-level part of the train state with the factors of all parts
_MODULES = {"attention", "cross", "mlp"}
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Low-rank factors of some parts of a model.

  Attributes:
    rank: of the factors.
    alpha: their product is multiplied by alpha / rank.
    parts: top-level parts that have them.
  """

  rank: int
  alpha: float
  parts: tuple[str, ...]

  def init(self, key: jax.Array, params: Mapping[str, Params]) -> dict[str, Params]:
    """Returns {part: new factors} for boxed parameters; they add zero. `down` is as in the authors' code."""
    flat: dict[Path, Any] = {}
    for path, kernel in _matrices(flatten_dict({part: params[part] for part in self.parts})).items():
      names, shape, stack, inputs = kernel.names, kernel.unbox().shape, *_axes(path, kernel.unbox().ndim)
      key, own = jax.random.split(key)
      limit = 1 / math.sqrt(math.prod(shape[stack:inputs]))
      down = jax.random.uniform(own, (*shape[:inputs], self.rank), jnp.float32, -limit, limit)
      up = jnp.zeros((*shape[:stack], self.rank, *shape[inputs:]), jnp.float32)
      flat[*path[:-1], LORA_DOWN] = nn.LogicallyPartitioned(down, (*names[:inputs], None))
      flat[*path[:-1], LORA_UP] = nn.LogicallyPartitioned(up, (*names[:stack], None, *names[inputs:]))
    return unflatten_dict(flat)

  def attach(self, params: Mapping[str, Params]) -> dict[str, Params]:
    """Returns the parts with the factors of params["lora"] beside their matrices, where the models apply them."""
    flat, scale = flatten_dict(params[PART]), self.alpha / self.rank
    flat = {path: x * scale if path[-1] == LORA_UP else x for path, x in flat.items()}
    parts = {name: tree for name, tree in params.items() if name != PART}
    return parts | unflatten_dict(flatten_dict({part: parts[part] for part in self.parts}) | flat)

  def merge(self, params: Mapping[str, Params]) -> dict[str, Params]:
    """Returns the parts with the factors of params["lora"] added to their matrices, in float32."""
    factors = flatten_dict(params[PART])
    parts = {name: tree for name, tree in params.items() if name != PART}
    flat = flatten_dict({part: parts[part] for part in self.parts})
    for path, kernel in _matrices(flat).items():
      down, up = (factors[*path[:-1], name] for name in (LORA_DOWN, LORA_UP))
      flat[path] = _merged(kernel, down, up, self.alpha / self.rank, _axes(path, kernel.ndim)[0])
    return parts | unflatten_dict(flat)


@jax.jit(static_argnums=4)
def _merged(kernel: jax.Array, down: jax.Array, up: jax.Array, scale: float, stack: int) -> jax.Array:
  layers = kernel.shape[:stack]
  product = jnp.matmul(
    down.reshape(*layers, -1, down.shape[-1]),
    up.reshape(*layers, down.shape[-1], -1),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return (kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def _matrices(flat: Mapping[Path, Any]) -> dict[Path, Any]:
  """Returns those of the flat parameters that are matrices of attention and MLP blocks."""
  return {path: x for path, x in flat.items() if path[-1] == "kernel" and _MODULES & set(path)}


def _axes(path: Path, ndim: int) -> tuple[int, int]:
  """Returns (first input axis, first output axis) of a matrix; an axis before the inputs is that of the layers."""
  stack = int("blocks" in path)
  return stack, ndim - 1 if path[-2] == "out" else stack + 1
