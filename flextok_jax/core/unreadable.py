"""What commands do about pictures that cannot be read: they are skipped, named and counted; too many are an error."""

from absl import logging

from flextok_jax.core.errors import warn_once

_met: set[str] = set()


def skip(reason: str | Exception, key: str = ""):
  """Logs that a picture is skipped.

  Args:
    reason: its name, and why it cannot be read.
    key: its name if it may be met again: it is logged once per process.
  """
  message = f"Skipped unreadable image {reason}"
  if key:
    warn_once(message, key=key)
    _met.add(key)
  else:
    logging.warning("%s", message)


def met() -> int:
  """Returns how many pictures, by key, this process has skipped, without those that its worker processes have read."""
  return len(_met)


def check(count: int, seen: int, share: float, *, what: str = "", example: str = "", remedy: str = ""):
  """Raises ValueError if too many pictures cannot be read: more than a share of them, and more than one.

  One never ends a command, because in a handful of pictures it would exceed any share; with a share of 0 it does.

  Args:
    count: pictures that cannot be read.
    seen: all pictures.
    share: config.data.max_unreadable.
    what: which pictures, for the message; default: SEEN images.
    example: name of one of them, and why it cannot be read; default: the log has it.
    remedy: default: how to go on without them.
  """
  if count > (max(1, share * seen) if share else 0):
    limit = f"the share data.max_unreadable={share}"
    raise ValueError(
      f"{count} of {what or f'{seen} images'} are unreadable, more than {limit}: {example or 'the log names them'}; "
      f"{remedy or 'remove them, or raise data.max_unreadable'}"
    )
