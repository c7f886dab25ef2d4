"""Config files: by the name of a shipped one, or by their path."""

from collections.abc import Iterable
import importlib
import inspect
import os
from pathlib import Path
import pkgutil
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from flextok_jax.config.fields import read_config


def load_config(spec: str) -> ConfigDict:
  """Returns the config that --config=SPEC names, locked.

  Args:
    spec: NAME or NAME:ARGUMENT of a shipped config ("flextok:d12_d12_in1k"), PATH.py or PATH.py:ARGUMENT of a file
      with get_config, or the config.json of a run or a model.

  Raises:
    FileNotFoundError: no such config.
    ValueError: the file cannot be executed, has no get_config, or does not take the argument.
  """
  if spec.endswith(".json"):
    if os.path.basename(spec) != "config.json":
      raise ValueError(f"{spec} is not a config: among .json files, only the config.json of a run or a model is one")
    return read_config(os.path.dirname(spec) or ".")
  config = call(spec, "get_config")
  if not isinstance(config, ConfigDict):
    raise ValueError(f"get_config() of {spec} must return a ConfigDict, got {config!r:.80}")
  return config.lock()


def call(spec: str, function: str) -> Any:
  """Calls a function of the config file that a spec names (load_config) with the argument of the spec.

  Raises:
    FileNotFoundError, ValueError: see load_config; errors inside the function are raised as ValueError.
  """
  name, *argument = spec.split(":", 1)
  found = getattr(_import(name), function, None)
  if found is None:
    raise ValueError(f"{name} has no {function}()")
  try:
    inspect.signature(found).bind(*argument)
  except TypeError:
    given = f"no argument, got {argument[0]!r}" if argument else "an argument: NAME:ARGUMENT"
    raise ValueError(f"config {name} takes {given}") from None
  try:
    return found(*argument)
  except ValueError:
    raise
  except Exception as e:  # whatever is wrong with it
    raise ValueError(f"{function}({', '.join(map(repr, argument))}) of {name}: {type(e).__name__}: {e}") from e


def check_argument(name: str, value: str, choices: Iterable[str]):
  """Raises ValueError, listing the choices, unless the argument of config `name` is one of them; "" is no argument."""
  choices = list(choices)
  if value not in choices:
    optional = "no argument or " if "" in choices else ""
    listed = ", ".join(filter(None, choices))
    raise ValueError(f"config {name} takes {optional}one of {listed}, as {name}:{choices[-1]}; got {value!r}")


def _import(name: str) -> ModuleType:
  """Imports a config file by the name of a shipped one or by its path."""
  shipped = importlib.import_module("flextok_jax.configs")
  names = sorted(module.name for module in pkgutil.iter_modules(shipped.__path__))
  path = Path(name)
  if path.suffix != ".py":
    if name not in names:
      raise FileNotFoundError(f"no config {name!r}: one of {', '.join(names)}, or the path of a file ending in .py")
  elif not path.is_file():
    raise FileNotFoundError(f"the config file {name} does not exist")
  elif path.resolve().parent == Path(shipped.__path__[0]).resolve():
    name = path.stem
  try:
    if name in names:
      return importlib.import_module(f"flextok_jax.configs.{name}")
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), path, "exec"), vars(module))
  except Exception as e:  # whatever is wrong with the file
    raise ValueError(f"config file {name}: {type(e).__name__}: {e}") from e
  return module
