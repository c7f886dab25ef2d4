"""Running commands in tests: in this process with errors raised, or in a process of their own as a user does.

Imported before jax starts, so it does not import jax.
"""

from importlib import metadata
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile

from absl import flags
import numpy as np
from PIL import Image
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Programs compile in a third of the time; other jax versions may not know these flags, which would be fatal.
XLA_FLAGS = {
  "0.10": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
  "0.12": "--xla_cpu_parallel_codegen_split_count=1",
}.get(".".join(metadata.version("jaxlib").split(".")[:2]), "")

GC_THRESHOLD = 100_000, 50, 100  # tracing a model takes a tenth less time than with Python's 700, 10, 10


def run(command, *args):
  """Runs a module with define_flags and main; errors are raised."""
  from flextok_jax import cli  # imports jax

  values = flags.FlagValues()
  command.define_flags(values)
  values([command.__name__, *args])
  cli.check_flags(values)
  command.main(values)


def fails(pattern, command, *args):
  """Asserts that a command raises a one-line error of a kind that cli.run turns into exit code 1."""
  with pytest.raises((ValueError, FileNotFoundError, flags.Error), match=pattern) as caught:
    run(command, *args)
  assert len(str(caught.value).splitlines()) == 1


def environment(devices: int = 1, **changes) -> dict[str, str]:
  """Returns the environment variables of a process with `devices` CPU devices."""
  count = f"--xla_force_host_platform_device_count={devices}"
  return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{XLA_FLAGS} {count}".strip(), **changes}


_servers: list[subprocess.Popen] = []


def shell(*args) -> tuple[int, str, str]:
  """Runs a module in its own process (fork_server.py), as a user does; returns (exit code, stdout, stderr)."""
  if not _servers:
    command = [sys.executable, "-m", "tests.support.fork_server"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _servers.append(subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes))  # ends with this process
  (server,) = _servers
  with tempfile.TemporaryDirectory() as folder:
    paths = {name: Path(folder) / name for name in ("stdout", "stderr")}
    request = {"arguments": list(map(str, args)), **{name: str(path) for name, path in paths.items()}}
    print(json.dumps(request), file=server.stdin, flush=True)
    code = int(server.stdout.readline())
    return code, *(path.read_text() for path in paths.values())


def config_file(path: Path, **overrides) -> Path:
  """Writes a config file for --config, of tests.support.tiny.tiny_config(**overrides), and returns its path."""
  path.write_text(f"from tests.support.tiny import tiny_config\nget_config = lambda: tiny_config(**{overrides!r})\n")
  return path


def read_folder(folder: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the images in a folder, int [h, w, 3], by file name."""
  return {path.name: np.asarray(Image.open(path)).astype(int) for path in Path(folder).iterdir()}
