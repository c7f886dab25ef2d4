"""Configs: the default and the range of every field, parsing, and config files."""

from flextok_jax.config.defaults import get_config
from flextok_jax.config.describe import describe
from flextok_jax.config.fields import derive, flatten, parse_config, read_config, with_fields
from flextok_jax.config.files import call, check_argument, load_config
from flextok_jax.config.ranges import TOKENIZER_STAGES, check, check_field, float_dtype

__all__ = [
  "TOKENIZER_STAGES",
  "call",
  "check",
  "check_argument",
  "check_field",
  "derive",
  "describe",
  "flatten",
  "float_dtype",
  "get_config",
  "load_config",
  "parse_config",
  "read_config",
  "with_fields",
]
