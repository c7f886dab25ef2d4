"""Damaged configs, JSON and YAML, read and used as the commands do; see experiments/mutants.py."""

import json
from pathlib import Path
import random
from typing import Any

from flextok_jax import config as common
from flextok_jax.configs import debug
from flextok_jax.evals import from_config
from flextok_jax.inference import decoding
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs, optim
from flextok_jax.weights.official import generator_config
from flextok_jax.weights.official.generator_settings import Settings
from tests.support.mutations import mutate
from tests.support.official_generator_files import CLASS_YAML, TEXT_YAML

_VALUES = (
  *(0, 1, -1, 2, 3, 17, 2**31, 2**63, 10**30, 0.0, -0.5, 0.5, 1.0, 1e-30, 1e30, 1e308, float("nan"), float("inf")),
  *("", "x", "none", "float64", "\ud800", "a\nb", "x" * 5000, None, True, False, [], {}, [0], [1, 2], [1.5], ["a"]),
  *([[]], {"a": 1}, [0, 1], [1, 0], [2**40] * 3),
)
_TAGS = ("!!bool ", "!!int ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!null ", "!x ", "&a ", "*a", "<<: ")
_TEXTS = ("${constants.dim}", "${mul:9,9}", "${div_int:1,0}", "${a}${a}", "1e999", ".nan", "-1", "99999999", "{}", "[]")


def config_json(rng: random.Random, folder: Path):
  """Changes fields or bytes of a workdir's config.json, and builds from it what commands build."""
  values = json.loads(debug.get_config().to_json())
  values["stage"] = rng.choice(("tokenizer", "tokenizer", "vae", "ar", "distill"))
  for _ in range(rng.choice((0, 1, 1, 2))):
    _change_field(values, rng)
  data = json.dumps(values).encode()
  (folder / "config.json").write_bytes(mutate(data, rng) if rng.random() < 0.3 else data)
  config = common.read_config(folder)
  optim.check(config, make_stage(config).trained_parts)
  optim.make_schedule(config.optim, config.train.num_steps)
  inputs.image_data(config)
  decoding.token_counts(config.eval.num_tokens, config.tokens.num_registers)
  from_config.check_same_model(config, config)


def _change_field(values: dict[str, Any], rng: random.Random):
  """Replaces or removes a field or a group of fields."""
  while True:
    name = rng.choice(sorted(values))
    if not isinstance(values[name], dict) or not values[name] or rng.random() < 0.1:
      break
    values = values[name]
  if rng.random() < 0.2:
    del values[name]
  else:
    values[name] = rng.choice(_VALUES)


def yaml(rng: random.Random, folder: Path):
  """Changes bytes or inserts tags, aliases and interpolations in the authors' config.yaml, and reads its settings."""
  text = rng.choice((CLASS_YAML, TEXT_YAML))
  for _ in range(rng.choice((0, 1, 2, 8))):
    places = [i + 1 for i, character in enumerate(text) if character in " :[{"]
    place = rng.choice(places)
    text = text[:place] + rng.choice(_TAGS + _TEXTS) + text[place:]
  data = text.encode()
  (folder / "config.yaml").write_bytes(mutate(data, rng) if rng.random() < 0.6 else data)
  generator_config.add_file(Settings(), str(folder / "config.yaml"))
