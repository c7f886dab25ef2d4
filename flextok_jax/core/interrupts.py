"""Ctrl-C: the first one ends a command between computations, or a run after its step, the second one at once."""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from typing import Any

EXIT_CODE = 130  # of a process that SIGINT ended, as shells report it
LINE = "stopped by Ctrl-C"
_REPEATED = 0.2  # seconds within which a second signal is the same key press, passed on by a launcher
_IGNORED = b"\0"  # written to the pipe of signal numbers


def end_at_once() -> None:
  """Makes Ctrl-C end this process without waiting for anything: while a command is importing its modules."""
  if _is_possible():
    signal.signal(signal.SIGINT, lambda signum, frame: _end())


def watch() -> None:
  """Makes Ctrl-C raise KeyboardInterrupt, as is Python's default, and a second one end this process at once."""
  if not _is_possible():
    return
  signal.signal(signal.SIGINT, signal.default_int_handler)
  listener = _Listener()
  os.register_at_fork(after_in_child=_forget)
  sys.unraisablehook = functools.partial(_report_ignored, listener.writer)


@contextlib.contextmanager
def as_sigterm(notice: str) -> Iterator[Callable[[], bool]]:
  """Makes the first Ctrl-C a SIGTERM to this process, and prints a line at once; a second one ends it at once.

  Yields:
    A function that returns whether there was a Ctrl-C.
  """
  if not _is_possible():
    yield lambda: False
    return
  received = []

  def stop(signum, frame):
    received.append(signum)
    os.kill(os.getpid(), signal.SIGTERM)

  previous = signal.signal(signal.SIGINT, stop)
  listener = _Listener(notice)
  try:
    yield lambda: bool(received)
  finally:
    signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)  # None: not set from Python
    listener.close()


def _is_possible() -> bool:
  """Whether this thread may set handlers, and SIGINT is not ignored, as by nohup."""
  return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def _end() -> None:
  print(LINE, file=sys.stderr, flush=True)
  os._exit(EXIT_CODE)


def _forget() -> None:
  with contextlib.suppress(ValueError):  # not forked by the main thread
    signal.set_wakeup_fd(-1)


def _report_ignored(writer: int, ignored: Any) -> None:
  """Has a KeyboardInterrupt raised again that Python ignored, as in finalizers and callbacks of the collector."""
  if issubclass(ignored.exc_type, KeyboardInterrupt):
    os.write(writer, _IGNORED)
  else:
    sys.__unraisablehook__(ignored)


class _Listener:
  """A thread that ends this process at the second SIGINT.

  Python delays signals while it waits for a computation or a compilation; a thread does not. It hears of them through
  the wakeup descriptor, whatever the handler of SIGINT is.

  Args:
    notice: a line that is printed at the first SIGINT.

  Attributes:
    writer: end of the pipe of signal numbers.
  """

  def __init__(self, notice: str = ""):
    self._notice = notice
    self._reader, self.writer = os.pipe()
    os.set_blocking(self.writer, False)
    self._previous = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._listen, name="interrupts", daemon=True)
    self._thread.start()

  def _listen(self) -> None:
    first = None
    while signals := os.read(self._reader, 4096):
      if signal.SIGINT in signals:
        if first is None:
          first = time.monotonic()
          if self._notice:
            print(self._notice, flush=True)
        elif time.monotonic() - first > _REPEATED:
          _end()
      if _IGNORED in signals:
        time.sleep(0.05)  # until the finalizer has ended
        main = ctypes.c_ulong(threading.main_thread().ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))

  def close(self) -> None:
    """Ends the thread; the listener before this one, if any, hears of signals again."""
    signal.set_wakeup_fd(self._previous)
    os.close(self.writer)
    self._thread.join()
    os.close(self._reader)
