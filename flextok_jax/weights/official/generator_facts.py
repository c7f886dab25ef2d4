"""Facts about an official generator, from settings, configuration files and weights, and whether all agree."""

from collections.abc import Mapping
from typing import Any

from flextok_jax.core.literals import quote
from flextok_jax.models.ar.generator import FFNS, NORMS
from flextok_jax.weights.official.modules import FLAG, SIZE, TEXT, Kind, exactly, integer, number, optional

COUNT = integer(1, 2**31 - 1)
DEPTH = integer(1, 1024)
RATIO = number(1e-3, 1024)
POSITIONS = exactly("absolute", "sincos1d", "sincos2d")
BIASES = ("qkv_bias", "proj_bias", "mlp_bias", "head_bias")  # facts of linear layers; "bias" is all of them
SETTINGS: dict[str, Kind] = {  # official_ar.load says what they are
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


class Facts:
  """What is said of a model, and by whom; two who disagree are an error that names both."""

  def __init__(self):
    self._said: dict[str, tuple[Any, str]] = {}

  def add(self, name: str, value: Any, origin: str):
    """Raises ValueError where another value was said before."""
    old, before = self._said.setdefault(name, (value, origin))
    if old != value:
      raise ValueError(f"{name} is {quote(old)} in {before}, but {quote(value)} in {origin}")

  def __contains__(self, name: str) -> bool:
    return name in self._said

  def get(self, name: str, default: Any = None) -> Any:
    return self._said[name][0] if name in self._said else default

  def origin(self, name: str) -> str:
    return self._said[name][1]


def add_settings(facts: Facts, settings: Mapping[str, object], origin: str):
  """Adds flat settings, of the names and kinds of SETTINGS.

  Raises:
    ValueError: an unknown name, a value of another kind, a contradiction.
  """
  for name, value in settings.items():
    if name not in SETTINGS:
      raise ValueError(f"unknown name {quote(name)} in {origin}: known are {', '.join(SETTINGS)}")
    if not SETTINGS[name].accepts(value):
      raise ValueError(f"{name} in {origin} must be {SETTINGS[name].supported}, got {quote(value)}")
    if name == "bias":
      for role in BIASES:
        facts.add(role, value, f"{origin} (bias)")
    elif name == "qk_norm":
      facts.add(name, value or "none", origin)
    elif (name, value) not in (("norm_eps", 0), ("qk_norm_eps", 0)):  # 0: that of the kind
      facts.add(name, value, origin)
