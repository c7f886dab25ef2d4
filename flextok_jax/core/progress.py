"""Progress of long computations: a bar (tqdm) on a terminal, and plain lines elsewhere, such as in a log file."""

from collections.abc import Iterable, Iterator
import shutil
import sys
from typing import Any, Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_LINES = 10  # lines per bar, at most
_shown: set["Bar"] = set()  # bars on the terminal that are not closed


class Bar:
  """Shows how many of `total` items are done; a context manager, which closes the bar.

  Args:
    total: number of items.
    what: the items, like "images decoded".
    enabled: True: a bar, even if stderr is no terminal (a notebook); False: nothing; None: a bar if stderr is a
      terminal, else a line on stdout after every tenth of the items.
    done: items that were done before.
  """

  def __init__(self, total: int, what: str, enabled: bool | None = None, done: int = 0):
    self._total, self._what, self._done = total, what, done
    self._lines = enabled is None and not sys.stderr.isatty()
    self._bar: Any = None
    if enabled or (enabled is None and not self._lines):
      columns, rows = shutil.get_terminal_size()  # not tqdm's own: for a terminal of unknown size it shows nothing
      self._bar = tqdm(total=total, desc=what, initial=done, file=sys.stderr, ncols=columns, nrows=rows)
      _shown.add(self)

  def __call__(self, done: int) -> None:
    """Shows that the first `done` items are done."""
    if self._bar is not None:
      self._bar.update(done - self._done)
    elif self._lines and (done * _LINES // self._total > self._done * _LINES // self._total):
      print(f"{self._what}: {done} of {self._total}", flush=True)
    self._done = done

  def close(self) -> None:
    """Leaves the bar as it is and ends its line."""
    if self._bar is not None:
      self._bar.close()
    _shown.discard(self)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()


def track(items: Iterable[T], total: int, what: str, enabled: bool | None = None) -> Iterator[T]:
  """Yields the items and shows how many the caller is done with; see Bar."""
  with Bar(total, what, enabled) as bar:
    for done, item in enumerate(items, 1):
      yield item
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
