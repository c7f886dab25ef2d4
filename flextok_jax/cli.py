"""What every command shares: one clear line for bad input instead of a traceback."""

from collections.abc import Callable
import sys

from absl import app, flags, logging

_EXPECTED = (ValueError, OSError)


def _fail(error: Exception, line: str = ""):
  logging.vlog(1, "traceback", exc_info=error)  # shown with --verbosity=1
  print("error:", " ".join((line or str(error)).split()), file=sys.stderr, flush=True)
  sys.exit(1)


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      flags.FLAGS.config.keys()  # a missing file shows itself at the first access
  except (AttributeError, KeyError) as e:
    overrides = [arg for arg in argv if arg.startswith("--config.")]
    _fail(e, f"unknown config key among {' '.join(overrides)} ({e}): all keys stand in configs/common.py")
  except Exception as e:  # whatever is wrong with a config file
    _fail(e)
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells a story at every checkpoint
  if len(rest) > 1:
    _fail(ValueError(f"unexpected argument {rest[1]!r}: options are given as --name=value"))
  return rest


def run(main: Callable[[], None]):
  """Parses the flags and calls main(); bad input ends with a line on stderr and exit code 1."""

  def call(argv):
    del argv
    try:
      main()
    except _EXPECTED as e:
      _fail(e)

  app.run(call, flags_parser=_parse)
