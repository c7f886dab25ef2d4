"""Settings and fixtures of the whole suite; set before jax starts: 8 virtual CPU devices, exact float32 products.

Nearly all time of these tiny models goes into compiling: so it optimises little and never compiles the same twice.
"""

import os
from pathlib import Path

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

SHARED = ROOT.parent / "shared" if (ROOT.parent / "shared" / "golden").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
  """The folder with numbers of the reference implementation, which stands beside the repository where there is one."""
  if SHARED is None:
    pytest.skip("no ../shared/golden beside the repository: reference numbers not at hand")
  return SHARED
