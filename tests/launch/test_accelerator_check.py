"""launch/accelerator_check.sh: the tiny mode as a user runs it, and failing steps with a stand-in for python."""

import os
from pathlib import Path
import subprocess
import sys

from tests.support.commands import ROOT, environment

STAND_IN = """#!/bin/bash
case $* in
  -c*) echo gpu ;;
  *--table=*) echo "| table |" ;;
  *tokenizer_xla*) echo "no such kernel" >&2; exit 3 ;;
  *) for arg in "$@"; do case $arg in --out=*) echo "$*" >"${arg#--out=}" ;; esac; done ;;
esac
"""


def check(*args, **changes):
  command = ["bash", str(ROOT / "launch" / "accelerator_check.sh"), *map(str, args)]
  return subprocess.run(
    command, cwd=ROOT, env=environment() | changes, capture_output=True, text=True, check=False, timeout=900
  )


def with_stand_in(folder: Path) -> dict[str, str]:
  (folder / "bin").mkdir(exist_ok=True)
  (folder / "bin" / "python").write_text(STAND_IN)
  (folder / "bin" / "python").chmod(0o755)
  return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def test_tiny_mode(tmp_path):
  path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
  done = check("--tiny", tmp_path / "out", PATH=path)
  assert done.returncode == 0, done.stdout + done.stderr
  text = (tmp_path / "out" / "table.md").read_text()
  assert text in done.stdout
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| cpu")
  ]
  compared, timed = [row for row in rows if row[-1] == "passed"], [row for row in rows if row[-1] != "passed"]
  assert [row[1:4] for row in compared] == [["parity_float32", "train", "plain"], ["parity_float32", "train", "fast"]]
  assert [row[1:4] for row in timed] == [["generator", "ar, 16 tokens", "fast"], ["tokenizer_auto", "train", "fast"]]
  assert all(float(row[7]) > 0 for row in timed)


def test_steps_that_fail_do_not_stop_the_others(tmp_path):
  out = tmp_path / "out"
  done = check(out, **with_stand_in(tmp_path))
  assert done.returncode == 1
  assert done.stderr.endswith(f"failed: tokenizer_xla; see their logs in {out}\n")
  assert "no such kernel" in done.stdout and (out / "table.md").read_text() == "| table |\n"
  names = {path.stem for path in out.glob("*.jsonl")}
  assert names == {
    *(
      "parity_float32",
      "parity_bfloat16_auto",
      "parity_bfloat16_xla",
      "parity_generator",
      "tokenizer_auto",
      "generator",
    )
  }
  arguments = (out / "tokenizer_auto.jsonl").read_text()
  assert "--config=flextok:d12_d12_in1k" in arguments and "--config.attention=auto" in arguments


def test_steps_beyond_the_limit_are_left_out(tmp_path):
  done = check(tmp_path / "out", FLEXTOK_CHECK_SECONDS="0", **with_stand_in(tmp_path))
  assert done.returncode == 1 and "generator: out of time" in done.stdout
  assert not list((tmp_path / "out").glob("*.jsonl"))


def test_without_an_accelerator_or_a_folder(tmp_path):
  path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
  done = check(tmp_path / "out", PATH=path)
  assert done.returncode == 2 and "error: jax sees no GPU or TPU here: use --tiny" in done.stderr
  assert check("--tiny").returncode == 2
  assert not (tmp_path / "out").exists()
