"""Commands as tests run them: in this process with errors raised, or in one of their own as a user does.

Imported before jax starts, so without it.
"""

from importlib import metadata
import os
from pathlib import Path
import subprocess
import sys

from absl import flags
import numpy as np
from PIL import Image
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Programs compile in a third of the time; in other versions the flags may be unknown, which is fatal.
XLA_FLAGS = (
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  if metadata.version("jaxlib").startswith("0.10.")
  else ""
)


def run(command, *args):
  """Runs a module with define_flags and main; raises what it raises."""
  values = flags.FlagValues()
  command.define_flags(values)
  values([command.__name__, *args])
  command.main(values)


def fails(pattern, command, *args):
  """Asserts that a command ends with one line of the errors that cli.run turns into exit code 1."""
  with pytest.raises((ValueError, FileNotFoundError), match=pattern) as caught:
    run(command, *args)
  assert len(str(caught.value).splitlines()) == 1


def environment(devices: int = 1, **changes) -> dict[str, str]:
  """Returns the variables of a process with so many CPU devices."""
  count = f"--xla_force_host_platform_device_count={devices}"
  return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{XLA_FLAGS} {count}".strip(), **changes}


def shell(*args, timeout=None):
  """Runs a module as a user does: (exit code, stdout, stderr)."""
  command = [sys.executable, "-m", *map(str, args)]
  done = subprocess.run(
    command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=timeout
  )
  return done.returncode, done.stdout, done.stderr


def config_file(path: Path, **overrides) -> Path:
  """Writes a config file for --config, of tests.support.tiny.tiny_config(**overrides), and returns its path."""
  path.write_text(f"from tests.support.tiny import tiny_config\nget_config = lambda: tiny_config(**{overrides!r})\n")
  return path


def read_folder(folder: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the images in a folder, int [h, w, 3], by file name."""
  return {path.name: np.asarray(Image.open(path)).astype(int) for path in Path(folder).iterdir()}
