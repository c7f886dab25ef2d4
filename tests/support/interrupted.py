"""A command that gets SIGINT: python -m tests.support.interrupted WHERE COUNT.

WHERE is "python" (between computations), "jax" (inside a computation that does not end), "flags" (while flags are
parsed), or "ignored" (in a finalizer, where Python ignores exceptions); COUNT signals are sent.
"""

import os
import signal
import sys
import threading
import time

import jax

from flextok_jax import cli


def send(count: int):
  """Sends signals to this process, 0.5 s apart."""
  for _ in range(count):
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)


def wait(where: str, count: str):
  """Waits for ever."""
  threading.Thread(target=send, args=(int(count),), daemon=True).start()
  endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: x / 2 + 1, x))
  if where == "jax":
    jax.block_until_ready(endless(1.0))
  elif where == "ignored":
    Finalized()
  for _ in range(600):  # Python raises the exception again after at most one of these
    time.sleep(0.1)


class Finalized:
  """An object whose finalizer sleeps."""

  def __del__(self):
    time.sleep(60)


if __name__ == "__main__":
  if sys.argv[1] == "flags":
    cli._parse = lambda *_, **__: wait(*sys.argv[1:])
  cli.run(wait, ["WHERE", "COUNT"])
