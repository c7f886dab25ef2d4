"""What every command shares: one clear line for bad input instead of a traceback."""

from collections.abc import Callable
import os
import sys

from absl import app, flags, logging

_EXPECTED = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, FileExistsError)


def _fail(error: Exception):
  logging.vlog(1, "traceback", exc_info=error)  # shown with --verbosity=1
  line = " ".join(str(error).split())
  print(f"error: {line}", file=sys.stderr, flush=True)
  # Data loading threads may be in mid-read; nothing of theirs is worth waiting for.
  os._exit(1) if _in_command else sys.exit(1)


_in_command = False


def run(main: Callable[[], None]):
  """Parses the flags and calls main(); bad input ends with a line on stderr and exit code 1."""

  def parse(argv):
    try:
      rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, *_EXPECTED) as e:
      _fail(e)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # orbax tells a story at every checkpoint
    if len(rest) > 1:
      _fail(ValueError(f"unexpected argument {rest[1]!r}: options are given as --name=value"))
    return rest

  def call(argv):
    del argv
    try:
      main()
    except _EXPECTED as e:
      _fail(e)

  app.run(call, flags_parser=parse)
