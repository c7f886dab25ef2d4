"""The frozen T5 that encodes prompts and captions, for generation and for training."""

from collections.abc import Callable
import functools
import os

import jax
import jax.numpy as jnp

from flextok_jax.models.perception.t5 import T5Encoder
from flextok_jax.parallel import sharding
from flextok_jax.weights.perception.t5 import load_t5


def load_t5_encoder(
  path: str | os.PathLike, dtype: str, features: int, mesh: jax.sharding.Mesh | None = None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Loads a T5 encoder.

  Args:
    path: folder in Hugging Face's format, or a repository of the hub.
    dtype: type of its parameters, products and features.
    features: the width that the generator expects, the encoder's d_model.
    mesh: devices to place the parameters on by their logical axes, and the features by rows; None: the default device.

  Returns:
    A jitted function (ids int32 [b, t], lengths int32 [b]) -> features [b, t, features].

  Raises:
    FileNotFoundError: there is no T5 at path.
    ValueError: a damaged or unsupported file, or an encoder of another width.
  """
  sizes, params = load_t5(path, dtype, mesh)
  if sizes["d_model"] != features:
    raise ValueError(
      f"config.text.features={features}, but the T5 encoder {path} has {sizes['d_model']}: "
      f"set text.features={sizes['d_model']}"
    )
  encoder = T5Encoder(**sizes, dtype=jnp.dtype(dtype))
  encode = jax.jit(
    lambda params, ids, lengths: encoder.apply({"params": params}, ids, lengths),
    out_shardings=None if mesh is None else sharding.batch_sharding(mesh),
  )
  return functools.partial(encode, params)


load_t5_once = functools.lru_cache(maxsize=1)(load_t5_encoder)
