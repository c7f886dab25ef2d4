"""Progress of long computations: a bar (tqdm) on a terminal, and plain lines elsewhere, such as in a log file."""

from collections.abc import Callable, Iterable, Iterator
import shutil
import sys
import time
from typing import Any, Self, TypeVar

import jax
from tqdm import tqdm

T = TypeVar("T")
_LINES = 10  # a line after each such part of the items,
_SOON = 5.0  # unless the last one, or the beginning, is less than so many seconds ago,
_SECONDS = 60.0  # and at least one in this time
_shown: set["Bar"] = set()  # bars on the terminal that are not closed


def on_terminal() -> bool:
  """Returns whether bars can be seen: stderr is a terminal."""
  return sys.stderr.isatty()


class Bar:
  """Shows, on process 0, how many items are done; a context manager, which closes the bar.

  Args:
    total: number of items; None: unknown.
    what: the items, like "images decoded".
    enabled: True: a bar, even if stderr is not a terminal (a notebook); False: nothing; None: a bar on a terminal, and
      elsewhere lines on stdout.
    done: items that were done before.
    transient: of a short computation, one of many: the bar disappears at its end, and there are no lines.
  """

  def __init__(self, total: int | None, what: str, enabled: bool | None = None, done: int = 0, transient: bool = False):
    self._total, self._what, self._first, self._done = total, what, done, done
    self._begun = self._printed = time.monotonic()
    self._bar: Any = None
    shown = enabled is not False and jax.process_index() == 0
    self._lines = shown and enabled is None and not on_terminal() and not transient
    if shown and (enabled or on_terminal()):
      columns, rows = shutil.get_terminal_size()  # not tqdm's own: for a terminal of unknown size it shows nothing
      self._bar = tqdm(
        total=total, desc=what, initial=done, leave=not transient, file=sys.stderr, ncols=columns, nrows=rows
      )
      _shown.add(self)

  def __call__(self, done: int) -> None:
    """Shows that the first `done` items are done."""
    if self._bar is not None:
      self._bar.update(done - self._done)
    elif self._lines and self._is_due(done):
      self._printed = time.monotonic()
      print(self._line(done), flush=True)
    self._done = done

  def _is_due(self, done: int) -> bool:
    waited = time.monotonic() - self._printed
    if done == self._total and self._printed > self._begun:
      return True
    passed = self._total and done * _LINES // self._total > self._done * _LINES // self._total
    return waited >= (_SOON if passed else _SECONDS)

  def _line(self, done: int) -> str:
    rate = max(done - self._first, 1) / max(time.monotonic() - self._begun, 1e-9)
    if self._total is None:
      return f"{self._what}: {done}, {rate:.1f}/s"
    left = f", {tqdm.format_interval((self._total - done) / rate)} left" if done < self._total else ""
    return f"{self._what}: {done} of {self._total}, {rate:.1f}/s{left}"

  def close(self) -> None:
    """Ends the line of the bar."""
    if self._bar is not None:
      self._bar.close()
    _shown.discard(self)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()


def track(
  items: Iterable[T],
  total: int | None,
  what: str,
  enabled: bool | None = None,
  *,
  size: Callable[[T], int] = lambda item: 1,
  transient: bool = False,
) -> Iterator[T]:
  """Yields the items and shows how many the caller is done with; see Bar.

  Args:
    size: an item counts as this many: batches as their rows.
  """
  done = 0
  with Bar(total, what, enabled, transient=transient) as bar:
    for item in items:
      yield item
      done += size(item)
      bar(done)


def write(line: str) -> None:
  """Prints a line on stdout, above the bars on the terminal."""
  if _shown:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
  else:
    print(line, flush=True)


def close_all() -> None:
  """Ends the lines of all bars, so that a message can follow."""
  for bar in list(_shown):
    bar.close()
