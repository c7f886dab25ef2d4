"""What every command shares: one clear line for bad input instead of a traceback, and a cache of compiled programs."""

from collections.abc import Callable, Iterable, Sequence
import functools
import json
import os
import sys
from typing import Any

from absl import app, flags, logging
import jax

from flextok_jax.parallel import processes

_EXPECTED = (ValueError, OSError)


def _fail(error: Exception, line: str = ""):
  logging.vlog(1, "traceback", exc_info=error)  # shown with --verbosity=1
  print("error:", " ".join((line or str(error)).split()), file=sys.stderr, flush=True)
  sys.exit(1)


def _parse(argv: list[str], arguments: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      flags.FLAGS.config.keys()  # a missing file shows itself at the first access
  except (AttributeError, KeyError) as e:
    overrides = [arg for arg in argv if arg.startswith("--config.")]
    _fail(e, f"unknown config key among {' '.join(overrides)} ({e}): all keys stand in flextok_jax/config.py")
  except Exception as e:  # whatever is wrong with a config file
    _fail(e)
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells a story at every checkpoint
  given = rest[1:]
  if len(given) > len(arguments):
    _fail(ValueError(f"unexpected argument {given[len(arguments)]!r}: options are given as --name=value"))
  if len(given) < len(arguments):
    _fail(ValueError(f"{arguments[len(given)]} is missing: the arguments are {' '.join(arguments)}"))
  return rest


def _keep_compiled():
  """Keeps compiled programs from run to run, unless jax was told where (JAX_COMPILATION_CACHE_DIR) or not to."""
  if jax.config.jax_compilation_cache_dir is None:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    jax.config.update("jax_compilation_cache_dir", os.path.join(home, "flextok_jax", "compiled"))


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
  """Returns what the items of --setting=name=value say to load_ar; values as in JSON (1, true, null), else texts.

  Raises:
    ValueError: an item that is no name=value.
  """
  settings = {}
  for item in items:
    name, equals, value = item.partition("=")
    if not equals or not name.isidentifier() or name in ("source", "mesh"):
      raise ValueError(f"--setting={item} must be name=value, with a name that flextok_jax.load_ar knows")
    try:
      settings[name] = json.loads(value)
    except ValueError:
      settings[name] = value
  return settings


def run(main: Callable[..., None], arguments: Sequence[str] = ()):
  """Parses the flags and calls main(*arguments); bad input ends with a line on stderr and exit code 1.

  Where several processes run the command together, as the environment says (parallel/processes.py), they join first.

  `arguments` names what stands on the command line besides flags; none of it may be left out.
  """

  def call(argv):
    _keep_compiled()
    with processes.failing_at_once():
      try:
        processes.initialize()
        main(*argv[1:])
      except _EXPECTED as e:
        _fail(e)

  app.run(call, flags_parser=functools.partial(_parse, arguments=arguments))


def numbers(flag: str, items: Iterable[str], kind: type = int) -> list:
  """Returns the items of a list flag as numbers.

  Raises:
    ValueError: an item that is none.
  """
  found = []
  for item in items:
    try:
      found.append(kind(item))
    except ValueError:
      what = "whole numbers" if kind is int else "numbers"
      raise ValueError(f"--{flag} takes {what} separated by commas, got {item!r}") from None
  return found
