"""Progress of long computations, on a terminal and in a log file."""

import os
import pty
import subprocess
import sys

import pytest

from flextok_jax.core import progress
from tests.support import commands

SCRIPT = """
from flextok_jax.core import progress
for i in progress.track(range(40), 40, "images"):
  if i == 20:
    progress.write("a message")
bar = progress.Bar(7, "stopped")
bar(3)
progress.close_all()
print("error", flush=True)
"""


def on_a_terminal(*command):
  """Returns what a process writes to its terminal."""
  ours, theirs = pty.openpty()
  with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=commands.ROOT) as process:
    os.close(theirs)
    written = b""
    while True:
      try:
        part = os.read(ours, 4096)
      except OSError:  # Linux reports the end of a terminal so
        break
      if not part:
        break
      written += part
  os.close(ours)
  assert not process.returncode, written
  return written.decode()


def test_a_terminal_shows_a_bar():
  """Messages go above the bar, and a bar that is stopped keeps its line."""
  written = on_a_terminal(sys.executable, "-c", SCRIPT)
  assert "images: 100%|" in written and "40/40 [" in written and "40 of 40" not in written
  assert "a message" in written.replace("\r", "\n").split("\n")
  last = [line.rsplit("\r", 1)[-1] for line in written.replace("\r\n", "\n").split("\n")]
  assert "stopped:  43%" in last[-3] and "3/7" in last[-3] and last[-2] == "error"


def test_a_log_file_gets_plain_lines(capsys):
  assert list(progress.track(range(40), 40, "images")) == list(range(40))
  out, err = capsys.readouterr()
  assert not err and out.splitlines() == [f"images: {done} of 40" for done in range(4, 41, 4)]
  with progress.Bar(7, "images", done=5) as bar:
    bar(6)
    bar(7)
  assert capsys.readouterr().out == "images: 6 of 7\nimages: 7 of 7\n"


@pytest.mark.parametrize("enabled", [True, False])
def test_a_caller_decides(capsys, enabled):
  """Notebooks are no terminals but show bars; functions are silent by default."""
  list(progress.track(range(3), 3, "images", enabled))
  out, err = capsys.readouterr()
  assert not out and ("3/3" in err) == enabled
