"""The wheel in its own environment: commands run from an empty folder, outside this checkout."""

from pathlib import Path
import shutil
import subprocess
import sys
import sysconfig
import venv

import numpy as np
from PIL import Image
import pytest

from tests.support import commands

ROOT = commands.ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """Returns the program folder of an environment in which the wheel is installed."""
  source, wheels, home = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "home"))
  for name in ("configs", "flextok_jax"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
    shutil.copy(ROOT / name, source)
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
  build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", str(source)]
  subprocess.run(build, check=True)
  venv.create(home, symlinks=True, with_pip=False)
  python = home / "bin" / "python"
  (wheel,) = wheels.glob("*.whl")
  subprocess.run([*pip, "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)], check=True)
  # Dependencies come from this environment; its .pth files, e.g. the one of this checkout, have no effect there.
  (packages,) = home.glob("lib/python*/site-packages")
  (packages / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
  return python.parent


@pytest.fixture
def run(installed, tmp_path):
  """Runs a program of that environment in an empty folder; returns its output."""
  environ = {k: v for k, v in commands.environment().items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

  def run(program, *args):
    done = subprocess.run(
      [installed / program, *map(str, args)], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  return run


def test_train_and_decode_from_an_empty_folder(run, tmp_path):
  home = Path(run("python", "-c", "import flextok_jax; print(flextok_jax.__file__)").strip()).parent
  assert not home.is_relative_to(ROOT) and (home / "configs" / "debug.py").is_file()
  asset = home / "assets" / "glyphs.safetensors"

  steps = ("--config.train.num_steps=3", "--config.train.log_every=1", "--config.optim.warmup_steps=1")
  printed = run("flextok-jax", "train", "--config=debug", "--workdir=run", *steps)
  assert "step 3/3" in printed and (tmp_path / "run" / "weights.safetensors").is_file()

  image = np.full((40, 40, 3), 30, np.uint8)
  image[10:30, 10:30] = 220
  Image.fromarray(image).save(tmp_path / "square.png")
  run("flextok-jax", "tokenize", f"--checkpoint={asset}", "--images=square.png", "--out=tokens.json")
  run("flextok-jax", "detokenize", f"--checkpoint={asset}", "--tokens=tokens.json", "--out=pictures")
  (picture,) = (tmp_path / "pictures").glob("*.png")
  pixels = np.asarray(Image.open(picture).convert("L"), float)
  assert pixels.shape == (64, 64) and pixels[24:40, 24:40].mean() > pixels[:8].mean() + 50


def test_commands_are_listed(run):
  listed = run("flextok-jax", "--help")
  modules = {path.stem for path in (ROOT / "flextok_jax").glob("*.py")} - {"__init__", "cli", "config"}
  lines = {line.split()[0]: line.split()[1:] for line in listed.splitlines() if line.startswith("  ")}
  assert {name for name in modules if "__main__" in (ROOT / "flextok_jax" / f"{name}.py").read_text()} == lines.keys()
  assert all(len(summary) > 3 for summary in lines.values())
