"""Settings of an official generator, collected from arguments, configuration files and weights, which must agree."""

from collections.abc import Mapping
from typing import Any

from flextok_jax.core.literals import quote
from flextok_jax.models.ar.generator import FFNS
from flextok_jax.models.layers import NORMS
from flextok_jax.weights.official.modules import FLAG, SIZE, TEXT, Kind, exactly, integer, number, optional

COUNT = integer(1, 2**31 - 1)
DEPTH = integer(1, 1024)
RATIO = number(1e-3, 1024)
POSITIONS = exactly("absolute", "sincos1d", "sincos2d")
BIASES = ("qkv_bias", "proj_bias", "mlp_bias", "head_bias")  # of the linear layers; "bias" is all of them
SETTINGS: dict[str, Kind] = {  # documented in generator.load
  "dim": SIZE,
  "head_dim": SIZE,
  "depth": DEPTH,
  "vocab": COUNT,
  "num_tokens": SIZE,
  "num_classes": optional(COUNT),
  "cross": FLAG,
  "bias": FLAG,
  "norm": exactly(*NORMS),
  "norm_eps": number(0, 1),
  "qk_norm_eps": number(0, 1),
  "qk_norm": exactly(None, "none", *NORMS),
  "ffn": exactly(*FFNS),
  "mlp_ratio": RATIO,
  "ffn_multiple_of": SIZE,
  "pos_embed": POSITIONS,
  "head_layernorm": FLAG,
  "readout_multiplier": number(1e-6, 1e6),
  "mup_base_width": SIZE,
  "text_dim": SIZE,
  "text_len": SIZE,
  "text_encoder": TEXT,
}


class Settings:
  """Collected settings with their provenance."""

  def __init__(self):
    self._found: dict[str, tuple[Any, str]] = {}

  def add(self, name: str, value: Any, origin: str):
    """Adds a setting.

    Raises:
      ValueError: another value was added before; the line names both values and origins.
    """
    first, first_origin = self._found.setdefault(name, (value, origin))
    if first != value:
      raise ValueError(f"{name} is {quote(first)} in {first_origin}, but {quote(value)} in {origin}")

  def __contains__(self, name: str) -> bool:
    return name in self._found

  def get(self, name: str, default: Any = None) -> Any:
    """Returns the value of a setting, or the default if it was not added."""
    return self._found[name][0] if name in self._found else default

  def origin(self, name: str) -> str:
    """Returns where a setting was found first."""
    return self._found[name][1]

  def add_all(self, settings: Mapping[str, object], origin: str):
    """Adds settings with the names and kinds of SETTINGS.

    Raises:
      ValueError: an unknown name, a value of another kind, or one that differs from the value added before.
    """
    for name, value in settings.items():
      if name not in SETTINGS:
        raise ValueError(f"unknown name {quote(name)} in {origin}: known are {', '.join(SETTINGS)}")
      if not SETTINGS[name].accepts(value):
        raise ValueError(f"{name} in {origin} must be {SETTINGS[name].supported}, got {quote(value)}")
      if name == "bias":
        for layer in BIASES:
          self.add(layer, value, f"{origin} (bias)")
      elif name == "qk_norm":
        self.add(name, value or "none", origin)
      elif (name, value) not in (("norm_eps", 0), ("qk_norm_eps", 0)):  # 0: the default of the kind of norm
        self.add(name, value, origin)
