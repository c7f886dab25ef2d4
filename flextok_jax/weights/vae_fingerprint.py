"""Which VAE wrote a latent: a short hash of all that decides it."""

from collections.abc import Mapping
import hashlib
import json

from flax.traverse_util import flatten_dict
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

_SETTINGS = ("latent_channels", "block_out_channels", "layers_per_block", "norm_groups")
_PARTS = ("encoder", "quant_conv")


def vae_fingerprint(config: ConfigDict, params: Mapping) -> str:
  """Returns the fingerprint of config.vae, 16 hex digits of a SHA-256.

  It covers sizes and arrays of the VAE's encoder; decoder and scaling factor have no influence on what it makes of an
  image. Arrays count as rounded to bfloat16: the same weights in float32 and bfloat16 agree. All processes of a run
  call it together, where they share the arrays.

  Args:
    params: a tree with {"vae": ...}, without boxes.
  """
  settings = {name: config.vae[name] for name in _SETTINGS}
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  for path, array in sorted(flatten_dict({part: params["vae"][part] for part in _PARTS}, sep="/").items()):
    array = np.ascontiguousarray(_on_host(array).astype(jnp.bfloat16))
    digest.update(f"\n{path} {list(array.shape)}\n".encode())
    digest.update(array.view(np.uint16).astype("<u2").tobytes())
  return digest.hexdigest()[:16]


def _on_host(array) -> np.ndarray:
  """The whole array, whose parts may be in several processes."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)
