"""Ctrl-C in commands: the first one ends a command between computations, the second one at once."""

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
  """Makes Ctrl-C raise KeyboardInterrupt, as is Python's default, and a second one end this process at once.

  Python delays signals while it waits for a computation or a compilation; a thread does not. It hears of them through
  the wakeup descriptor, also where a command has its own handler of SIGINT.
  """
  if not _is_possible():
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.register_at_fork(after_in_child=_forget)
  sys.unraisablehook = functools.partial(_report_ignored, writer)
  threading.Thread(target=_listen, args=(reader,), name="interrupts", daemon=True).start()


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


def _listen(reader: int) -> None:
  first = None
  while signals := os.read(reader, 4096):
    if signal.SIGINT in signals:
      if first is not None and time.monotonic() - first > _REPEATED:
        _end()
      first = first or time.monotonic()
    if _IGNORED in signals:
      time.sleep(0.05)  # until the finalizer has ended
      main = ctypes.c_ulong(threading.main_thread().ident or 0)
      ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))
