"""Fields of configs: changing, flattening and parsing them."""

from collections.abc import Mapping
import json
import os
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from flextok_jax.config.defaults import get_config
from flextok_jax.config.ranges import check_field, flat

_MAX_TEXT = 1_000_000  # characters of JSON; a config has about 6,000


def derive(**overrides) -> ConfigDict:
  """Returns the base configuration with dotted or nested overrides: derive(seed=1, encoder=dict(width=64))."""
  c = get_config()
  c.update(overrides)  # an unknown field is an error, as the configuration is locked
  return c


def flatten(config: ConfigDict) -> dict:
  """Returns {dotted name: value} of all fields, values as in JSON (tuples are lists)."""
  return flat(json.loads(config.to_json()))


def with_fields(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
  """Returns a locked copy of a config, frozen or not, with new values of dotted fields: {"vae.scaling_factor": 0.2}.

  Raises:
    ValueError: an unknown field, or a value out of its range.
  """
  for name, value in fields.items():
    check_field(name, value)
  config = ConfigDict(config).copy_and_resolve_references()  # not frozen
  config.update_from_flattened_dict(dict(fields))
  return config.lock()


def read_config(workdir: str | os.PathLike) -> ConfigDict:
  """Returns the config in a run's workdir.

  Raises:
    FileNotFoundError: it has no config.json.
    ValueError: it is not a valid config, see parse_config.
  """
  path = epath.Path(workdir) / "config.json"  # the workdir may be in a bucket
  if not path.exists() or (os.path.exists(path) and not os.path.isfile(path)):  # reading a FIFO can hang
    raise FileNotFoundError(f"{workdir} is not the workdir of a run: it has no config.json")
  with path.open("rb") as f:
    return parse_config(f.read(_MAX_TEXT + 1).decode("utf-8-sig", "replace"), str(path))


def parse_config(text: str, origin: str) -> ConfigDict:
  """Parses the JSON of a config. Fields that it lacks, which were added since, have their defaults.

  Args:
    origin: where the text is from, for messages.

  Raises:
    ValueError: not JSON, no config of flextok_jax, an unknown field, or a value out of its range.
  """
  try:
    if len(text) > _MAX_TEXT:
      raise ValueError(f"more than {_MAX_TEXT} characters")
    values = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise ValueError(f"the config in {origin} is not JSON: {e}") from None
  if not isinstance(values, dict) or "stage" not in values:
    raise ValueError(f"the config in {origin} does not name a stage: not a file of flextok_jax")
  try:
    return with_fields(get_config(), {name: _tuples(value) for name, value in flat(values).items()})
  except (ValueError, RecursionError) as e:
    raise ValueError(f"the config in {origin}: {e}") from None


def _tuples(value: Any) -> Any:
  """Returns JSON data with tuples in place of lists, as configs have."""
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
