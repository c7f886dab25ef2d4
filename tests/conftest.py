"""Settings and fixtures of the whole suite, set before jax starts: 8 virtual CPU devices, float32 matmul precision.

These tiny models spend nearly all their time tracing and compiling, so XLA optimises little, compiled programs are
cached, and Python looks for reference cycles more rarely: tracing makes many objects that are not garbage.
"""

import gc
import os
from pathlib import Path
import signal
import subprocess

from tests.support import commands

ROOT = commands.ROOT
os.environ.update(commands.environment(devices=8))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and so by children, if started in the background
gc.freeze()
gc.set_threshold(*commands.GC_THRESHOLD)

# The slowest test files. pytest-xdist distributes whole files, so the slowest ones run first and all workers finish
# at about the same time.
LONG_FILES = [
  "test_repa.py",
  "test_evaluate_samples.py",
  "test_loop.py",
  "test_resume.py",
  "test_notebooks.py",
  "test_flops.py",
  "test_launch.py",
  "test_sweep.py",
  "test_processes.py",
  "test_loop_shapes.py",
  "test_loop_vae.py",
  "test_fast.py",
  "test_benchmark.py",
  "test_goodput.py",
  "test_study.py",
  "test_commands.py",
  "test_vae_adversarial.py",
  "test_training_options.py",
  "test_evaluate.py",
  "test_mup_check.py",
  "test_convert.py",
]

MOST_MEMORY = 4e9  # bytes of a process after which compiled programs are dropped

SHARED = ROOT.parent / "shared" if (ROOT.parent / "shared" / "golden").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
  """The folder with the reference implementation's numbers, next to the repository; skips the test if it is absent."""
  if SHARED is None:
    pytest.skip("no ../shared/golden beside the repository: reference numbers not at hand")
  return SHARED


@pytest.fixture
def small_disk(tmp_path):
  """A folder on its own file system: (path, function that fills it until so many bytes are left)."""
  path = tmp_path / "disk"
  path.mkdir()
  done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, check=False)
  if done.returncode:
    pytest.skip(f"a file system of its own needs the right to mount: {done.stderr.decode().strip()}")

  def fill(left):
    stat = os.statvfs(path)
    (path / "filler").write_bytes(b"\0" * (stat.f_bavail * stat.f_frsize - left))

  yield path, fill
  subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture(scope="module")
def shared_programs():
  """Runs of a test file with the same model, loss and optimiser share their programs."""
  from tests.support.runs import programs_shared

  with programs_shared():
    yield


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
  """Drops compiled programs and garbage after a test file, if the process has grown large."""
  yield
  try:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
  except OSError:  # not Linux
    return
  if pages * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY:
    jax.clear_caches()
    gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  order = {name: i for i, name in enumerate(LONG_FILES)}
  items.sort(key=lambda item: order.get(item.path.name, len(order)))
