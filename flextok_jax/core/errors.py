"""Values and messages of other libraries, shortened for one-line messages of ours."""

from typing import Any

from absl import logging


def first_line(error: str | Exception, limit: int | None = None) -> str:
  """Returns the first line of an error's message, at most `limit` characters; its type if it has no message."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def quote(value: Any) -> str:
  """Returns at most 80 characters of repr(value), on one line."""
  text = " ".join(repr(value).split())
  return text if len(text) <= 80 else f"{text[:77]}..."


_warned: set[str] = set()


def warn_once(message: str, key: str = ""):
  """Logs a warning once per process.

  Args:
    message: of one line.
    key: the same of warnings of which only the first is logged; default: the message.
  """
  if (key or message) not in _warned:
    _warned.add(key or message)
    logging.warning("%s", message)
