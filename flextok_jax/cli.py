"""What the commands share: flags, one line for bad input instead of a traceback, a cache of compiled programs.

Also the console script: flextok-jax COMMAND [--flags] is python -m flextok_jax.COMMAND [--flags].
"""

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import gc
import io
import json
import math
import os
from pathlib import Path
import re
import runpy
import sys
import textwrap
import traceback
from typing import Any

from absl import app, flags, logging
import jax
from ml_collections import ConfigDict, config_flags

from flextok_jax import config as common
from flextok_jax.config.ranges import MAX_TILE
from flextok_jax.core import accelerators, files, interrupts, progress, workdirs
from flextok_jax.core.extras import MissingPackageError
from flextok_jax.data import transforms
from flextok_jax.ops import guidance
from flextok_jax.parallel import processes

COMMANDS = (
  *("train", "evaluate", "tokenize", "detokenize", "sample", "search", "demo", "convert", "export", "study", "sweep"),
  *("compile", "benchmark", "mup_check"),
)
_MAY_BE_EMPTY = (  # flags of a study whose defaults are replaced by nothing
  *("temperatures", "top_ks", "top_ps", "guidance_scales", "decoder_scales", "decoder_step_counts"),
)
_EXPECTED = (ValueError, OSError, MissingPackageError)


def main():
  """Runs the console script flextok-jax."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in COMMANDS:
    del sys.argv[1]
    runpy.run_module(f"flextok_jax.{name}", run_name="__main__", alter_sys=True)
  elif name in ("-h", "--help", "help"):
    print("flextok-jax COMMAND [--flags]; flextok-jax COMMAND --help describes the flags.\n")
    for command in COMMANDS:
      print(f"  {command:17} {_summary(command)}")
  else:
    print(f"error: unknown command {name!r}: one of {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(1)


def _summary(command: str) -> str:
  """Returns the first line of a command's docstring, without importing the command."""
  text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{command}.py").read_text())) or ""
  return text.partition("\n")[0]


def _fail(error: Exception, line: str = ""):
  logging.vlog(1, "traceback", exc_info=error)  # shown with --verbosity=1
  message = " ".join((line or with_flags(str(error), {name: name for name in flags.FLAGS})).split())
  progress.close_all()
  print("error:", message, file=sys.stderr, flush=True)
  _free(error)
  sys.exit(1)


def _free(error: BaseException):
  """Frees what the frames of an error hold: of shared memory that is left at the end Python would report a leak."""
  traceback.clear_frames(error.__traceback__)
  gc.collect()


def with_flags(message: str, names: Mapping[str, str]) -> str:
  """Writes --flag=value for each argument=value in a message: names maps arguments to flags."""
  pattern = rf"(?<![\w.'-])({'|'.join(map(re.escape, names))})="
  return re.sub(pattern, lambda found: f"--{names[found[1]]}=", message)


@contextlib.contextmanager
def renamed(**names: str) -> Iterator[None]:
  """Puts flags in place of arguments in the message of a ValueError: renamed(num_steps="decoder_steps")."""
  try:
    yield
  except ValueError as e:
    raise ValueError(with_flags(str(e), names)) from e


class _ConfigParser(flags.ArgumentParser):
  """Parses --config: the name of a shipped config or the path of a file, see load_config."""

  def parse(self, argument: str) -> ConfigDict:
    return common.load_config(argument)


def define_config_flag(help_text: str, values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None):
  """Defines --config and the --config.FIELD that argv (default: sys.argv) has; returns the holder of the config."""
  holder = config_flags.DEFINE_config_file("config", None, help_text, flag_values=values, sys_argv=argv)
  flags.DEFINE_bool("print_config", False, "Print the config, with comments, and end.", flag_values=values)
  values["config"].parser = _ConfigParser()
  return holder


def define_posemb_flag(values: flags.FlagValues):
  """Defines --posemb_scaling, of the tokenizer."""
  flags.DEFINE_string(
    "posemb_scaling",
    None,
    "How the tokenizer's positions fit other sizes than that of training: absolute, interpolate or scaled; default: "
    "the checkpoint's.",
    flag_values=values,
  )


def define_size_flags(values: flags.FlagValues):
  """Defines --size, see parse_size, and --posemb_scaling and --vae_tile, which other sizes may need."""
  flags.DEFINE_list(
    "size", None, "height,width of the pictures in pixels; default: the tokenizer's image_size.", flag_values=values
  )
  define_posemb_flag(values)
  define_tile_flag(values)


def parse_size(values: flags.FlagValues) -> tuple[int, int] | None:
  """Returns --size as (height, width), None if it is not given.

  Raises:
    ValueError: not two whole numbers.
  """
  if values.size is None:
    return None
  sides = numbers("size", values.size)
  if len(sides) != 2:
    raise ValueError(f"--size={','.join(values.size)} must be height,width in pixels, such as 192,352")
  return sides[0], sides[1]


def define_tile_flag(values: flags.FlagValues):
  """Defines --vae_tile, of the tokenizer."""
  flags.DEFINE_integer(
    "vae_tile",
    None,
    "Pixels per side above which the VAE works in tiles of at most this size, to save memory; 0: never; default: the "
    "checkpoint's.",
    0,
    MAX_TILE,
    flag_values=values,
  )


def define_resize_flag(values: flags.FlagValues, note: str = ""):
  """Defines --resize, of pictures."""
  flags.DEFINE_enum(
    "resize",
    "crop",
    transforms.RESIZES,
    f"{note}crop: shorter side to the image size, centre; fit: the whole picture at about the area of training, sides "
    "rounded to patches; none: as it is.",
    flag_values=values,
  )


def define_data_flag(values: flags.FlagValues = flags.FLAGS):
  """Defines --data, see with_data."""
  flags.DEFINE_string(
    "data",
    None,
    "A folder of pictures: the only source, of training and of evaluation, in place of those of the config.",
    flag_values=values,
  )


def with_data(config: ConfigDict, values: flags.FlagValues) -> ConfigDict:
  """Returns a config with the folder --data as its only source, also of evaluation; unchanged without --data.

  Raises:
    ValueError: the config reads shards, not sources.
  """
  if not values.data:
    return config
  for name in ("tokens", "latents", "trajectories"):
    if config.data[name]:
      raise ValueError(f"--data={values.data} has no effect, as data.{name}={config.data[name]} is read: give one")
  sources = common.get_config().data.sources
  fields = {f"data.sources.{name}.{field}": value for name in sources for field, value in sources[name].items()}
  fields |= {f"data.sources.{name}.weight": float(name == "folder") for name in sources}
  fields |= {"data.sources.folder.path": values.data, "eval.sources": ("folder",)}
  return common.with_fields(config, fields)


def config_of_run(values: flags.FlagValues) -> ConfigDict | None:
  """Returns --config, or without it the config in --workdir, with --data; None if there is neither."""
  config = values.config
  if config is None and values.workdir and (workdirs.resolve(values.workdir) / "config.json").exists():
    config = common.read_config(workdirs.resolve(values.workdir))
  return config if config is None else with_data(config, values)


def config_spec(values: flags.FlagValues) -> str:
  """Returns what --config was given: NAME, NAME:ARGUMENT, PATH.py or PATH.py:ARGUMENT."""
  return config_flags.get_config_filename(values["config"])


def _print_help():
  """Prints the docstring of the command, its flags, and the fields of a config if it takes one."""
  values = flags.FLAGS
  print((sys.modules["__main__"].__doc__ or "").strip(), "\n\nflags:")
  for module, found in sorted(values.flags_by_module_dict().items()):
    for flag in sorted(found, key=lambda flag: flag.name) if "flextok_jax" in module else ():
      usual = f" (default: {flag.default_as_str})" if flag.default is not None else ""
      text = " ".join(f"{flag.help}{usual}".split())
      print(textwrap.fill(f"--{flag.name}: {text}", 120, initial_indent="  ", subsequent_indent="    "))
  if "config" in values:
    print("\nfields of --config, as --config.NAME=VALUE, and their defaults:\n")
    print(common.describe(common.get_config()), end="")


def _parse(argv: list[str], arguments: Sequence[str]) -> list[str]:
  if any(re.fullmatch("-h|--?help(short|full)?", arg) for arg in argv[1:]):
    _print_help()
    sys.exit(0)
  try:
    rest = flags.FLAGS(argv)
  except (AttributeError, KeyError) as e:
    overrides = [arg for arg in argv if arg.startswith("--config.")]
    _fail(e, f"unknown config key among {' '.join(overrides)} ({e}): flextok_jax/config/defaults.py lists all keys")
  except Exception as e:  # whatever is wrong with a config file
    _fail(e)
  try:
    check_flags(flags.FLAGS)
  except ValueError as e:
    _fail(e)
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # orbax logs every checkpoint
  given = rest[1:]
  if len(given) > len(arguments):
    _fail(ValueError(f"unexpected argument {given[len(arguments)]!r}: options are given as --name=value"))
  if len(given) < len(arguments):
    _fail(ValueError(f"{arguments[len(given)]} is missing: the arguments are {' '.join(arguments)}"))
  return rest


def check_flags(values: flags.FlagValues):
  """Raises ValueError for an empty list, a number that is not finite, or a field of --config out of its range."""
  for name in values:
    flag = values[name]
    if isinstance(flag.parser, flags.ListParser) and flag.present and not flag.value and name not in _MAY_BE_EMPTY:
      raise ValueError(f"--{name} is empty: give items separated by commas, or leave the flag out")
    if isinstance(flag.value, float) and not math.isfinite(flag.value) and flag.value != flag.default:
      raise ValueError(f"--{name}={flag.value} must be a finite number")
  if "config" in values and values.config is not None:
    common.check(values.config)


def _keep_compiled():
  """Caches compiled programs across runs, unless JAX_COMPILATION_CACHE_DIR names a folder already."""
  if jax.config.jax_compilation_cache_dir is None:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    jax.config.update("jax_compilation_cache_dir", os.path.join(home, "flextok_jax", "compiled"))


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
  """Returns the settings for load_ar that --setting=name=value items hold; values are JSON (1, true) or else text.

  Raises:
    ValueError: an item is not name=value.
  """
  settings = {}
  for item in items:
    name, equals, value = item.partition("=")
    if not equals or not name.isidentifier() or name in ("source", "mesh"):
      raise ValueError(f"--setting={item} must be name=value, with a name that flextok_jax.load_ar knows")
    try:
      settings[name] = json.loads(value)
    except (ValueError, RecursionError):
      settings[name] = value
  return settings


def run(main: Callable[..., None], arguments: Sequence[str] = ()):
  """Parses the flags and calls main(*arguments).

  Bad input ends with one line on stderr and exit code 1, Ctrl-C with one line and exit code 130.

  If the environment says that several processes run the command together (parallel/processes.py), they connect first.

  Args:
    main: the command.
    arguments: names of the positional arguments on the command line, all required.
  """

  def call(argv):
    if isinstance(sys.stdout, io.TextIOWrapper):
      sys.stdout.reconfigure(errors="backslashreplace")  # names of files may have bytes that are not UTF-8
    _keep_compiled()
    with processes.exit_on_failure(), _one_line():
      if "print_config" in flags.FLAGS and flags.FLAGS.print_config:
        _print_config(flags.FLAGS)
        return
      processes.initialize()
      main(*argv[1:])

  interrupts.watch()
  with _one_line():
    app.run(call, flags_parser=functools.partial(_parse, arguments=arguments))


def _print_config(values: flags.FlagValues):
  config = config_of_run(values) if "workdir" in values else values.config
  if config is None:
    raise ValueError("no config to print: give --config=NAME" + " or --workdir=DIR of a run" * ("workdir" in values))
  print(common.describe(config), end="")


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
  """Ends the process with one line on stderr for bad input, devices that cannot start, and Ctrl-C."""
  try:
    yield
  except _EXPECTED as e:
    _fail(e)
  except (RuntimeError, AssertionError):  # JAX raises these if devices cannot start; then start raises an OSError
    try:
      accelerators.start()
    except OSError as e:
      _fail(e)
    raise
  except KeyboardInterrupt as e:
    progress.close_all()
    print(" ".join(str(e).split()) or interrupts.LINE, file=sys.stderr, flush=True)
    _free(e)
    sys.exit(interrupts.EXIT_CODE)


def numbers(flag: str, items: Iterable[str], kind: type = int) -> list:
  """Returns the items of a list flag as numbers.

  Raises:
    ValueError: an item is not a number.
  """
  found = []
  for item in items:
    try:
      found.append(kind(item))
      if not math.isfinite(found[-1]):
        raise ValueError
    except (ValueError, OverflowError):
      what = "whole numbers" if kind is int else "finite numbers"
      raise ValueError(f"--{flag} takes {what} separated by commas, got {item!r:.80}") from None
  return found


def check_value(flag: str, field: str, value: Any):
  """Raises ValueError, which names the flag, unless the field of a config may have the value."""
  try:
    common.check_field(field, value)
  except ValueError as e:
    raise ValueError(f"--{flag}: {e}") from None


def require(values: flags.FlagValues, *names: str):
  """Raises ValueError for the first of these flags that is not given."""
  for name in names:
    if not values[name].value:
      raise ValueError(f"--{name} is missing")


def local_path(given: str | os.PathLike, what: str) -> Path:
  """Returns a path on this machine, with ~ expanded; ValueError if it is in a bucket or has another scheme.

  Args:
    given: the path.
    what: the flag or argument that it is of.
  """
  if workdirs.is_remote(given):
    raise ValueError(f"{what}={given} is in a bucket, where this command cannot read or write: give a local path")
  return Path(workdirs.resolve(given, what))


def new_folder(given: str | os.PathLike, what: str) -> Path:
  """Returns local_path(given, what), which need not exist; ValueError if it is a file or cannot be written."""
  folder = local_path(given, what)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{what}={folder} is a file: give a folder")
  files.check_writable(folder)
  return folder


def new_file(given: str | os.PathLike, what: str) -> Path:
  """Returns local_path(given, what); ValueError if it is a folder or cannot be written."""
  path = local_path(given, what)
  if path.is_dir():
    raise ValueError(f"{what}={path} is a folder: give a file")
  files.check_writable(path.parent)
  return path


def out_folder(values: flags.FlagValues) -> Path:
  """Returns --out as new_folder."""
  return new_folder(values.out, "--out")


def out_file(values: flags.FlagValues) -> Path | None:
  """Returns --out as new_file, or None if it is not given."""
  return new_file(values.out, "--out") if values.out else None


DECODER_FLAGS = {"num_steps": "decoder_steps", "guidance": "decoder_guidance", "guidance_scale": "decoder_scale"}


def define_draw_flags(values: flags.FlagValues):
  """Defines what commands that draw samples have in common: the tokenizer, conditions, choices of tokens, decoder."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  real = functools.partial(flags.DEFINE_float, flag_values=values)
  string("tokenizer", None, "The tokenizer that the generator was trained with: file, folder or hub repository.")
  define_setting_flag(values)
  flags.DEFINE_list("classes", [], "Numbers or names of classes, or 'all'.", flag_values=values)
  string("prompts_file", None, "Text file with one prompt per line.")
  real("guidance_scale", None, "Classifier-free guidance of the generator; 1: off; default: the checkpoint's.")
  real("temperature", None, "Logits are divided by it; default: the checkpoint's.", 0.0)
  integer("top_k", None, "Draw from the k most likely tokens; 0: off; default: the checkpoint's.", 0)
  real(
    "top_p",
    None,
    "Draw from the most likely tokens of this total probability; 0: off; default: the checkpoint's.",
    0.0,
    1.0,
  )
  flags.DEFINE_bool("greedy", False, "Take the most likely token.", flag_values=values)
  integer("decoder_steps", None, "Euler steps of the tokenizer's decoder; default: the tokenizer's.", 1)
  flags.DEFINE_enum("decoder_guidance", None, guidance.MODES, "Default: the tokenizer's.", flag_values=values)
  real("decoder_scale", None, "Guidance scale of the decoder; 1: off; default: the tokenizer's.")


def define_setting_flag(values: flags.FlagValues):
  """Defines --setting."""
  flags.DEFINE_multi_string(
    "setting", [], "name=value, a setting of flextok_jax.load_ar for the released format.", flag_values=values
  )


def choice_flags(values: flags.FlagValues) -> dict[str, Any]:
  """Returns the flags that say how tokens are chosen, by name."""
  return {name: values[name].value for name in ("guidance_scale", "temperature", "top_k", "top_p", "greedy")}


def decoder_flags(values: flags.FlagValues) -> dict[str, Any]:
  """Returns the flags of the decoder's sampler by the names of its settings; errors: renamed(**DECODER_FLAGS)."""
  return {name: values[flag].value for name, flag in DECODER_FLAGS.items()}


def eval_fields(values: flags.FlagValues) -> dict[str, Any]:
  """Returns the fields of a config that the flags of an evaluation set, by dotted name.

  Raises:
    ValueError: a value out of its range.
  """
  fields: dict[str, Any] = {}
  if values.num_tokens:
    fields["eval.num_tokens"] = tuple(numbers("num_tokens", values.num_tokens))
  if values.sources:
    fields["eval.sources"] = tuple(values.sources)
  for name in ("num_images", "batch_size", "grid_images"):
    if name in values and values[name].value is not None:
      fields[f"eval.{name}"] = values[name].value
  if values.seed is not None:
    fields["seed"] = values.seed
  for name, value in fields.items():
    check_value(name.removeprefix("eval."), name, value)
  return fields
