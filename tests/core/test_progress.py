"""Progress of long computations, on a terminal and in a log file."""

import itertools
import os
import pty
import re
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


def test_a_log_file_gets_plain_lines(capsys, monkeypatch):
  list(progress.track(range(40), 40, "images"))
  assert capsys.readouterr() == ("", "")  # it takes less than seconds
  clock = itertools.count(0, 6)
  monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
  assert list(progress.track(range(40), 40, "images")) == list(range(40))
  out, err = capsys.readouterr()
  assert not err and [int(done) for done in re.findall(r"^images: (\d+) of 40, [\d.]+/s", out, re.M)] == [
    *range(4, 41, 4)
  ]
  assert out.count(" left\n") == 9
  with progress.Bar(7, "images", done=5) as bar:
    bar(6)
    bar(7)
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition(",")[0] for line in lines] == ["images: 6 of 7", "images: 7 of 7"]


def test_an_unknown_total_and_a_slow_computation_get_a_line_per_minute(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  for total in (None, 1000):
    for batch in progress.track([3] * 8, total, "images", size=lambda batch: batch):
      now[0] += 25 * (batch == 3)
  expected = ["images: 9, 0.1/s", "images: 18, 0.1/s", "images: 9 of 1000, 0.1/s", "images: 18 of 1000, 0.1/s"]
  assert [line.partition("/s")[0] + "/s" for line in capsys.readouterr().out.splitlines()] == expected


def test_a_transient_bar_is_no_line(capsys):
  list(progress.track(range(3), 3, "images", transient=True))
  assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("enabled", [True, False])
def test_a_caller_decides(capsys, enabled):
  """Notebooks are no terminals but show bars; functions are silent by default."""
  list(progress.track(range(3), 3, "images", enabled))
  out, err = capsys.readouterr()
  assert not out and ("3/3" in err) == enabled
