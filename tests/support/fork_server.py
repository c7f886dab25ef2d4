"""Runs modules as processes that start fast: forks of one process that has imported what they need.

Reads requests as JSON lines, {"arguments": [module, argument, ...], "stdout": path, "stderr": path}, and answers each
with the exit code. The commands themselves are imported in the fork, as `python -m` does: they define flags.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import sys
import warnings

from tests.support.commands import GC_THRESHOLD


def preload():
  """Imports the packages of flextok_jax and the slow modules that they import lazily."""
  import matplotlib.figure  # noqa: F401

  import flextok_jax
  from flextok_jax import cli  # noqa: F401

  packages = [module.name for module in pkgutil.iter_modules(flextok_jax.__path__) if module.ispkg]
  for name in packages:
    package = importlib.import_module(f"flextok_jax.{name}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
      importlib.import_module(module.name)
  from jax._src import xla_bridge

  assert not xla_bridge.backends_are_initialized()  # a fork of an initialized backend would hang
  gc.freeze()
  gc.set_threshold(*GC_THRESHOLD)


def serve() -> list[str] | None:
  """Answers requests; returns the arguments in each fork, and None when there are no more requests."""
  for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
      for descriptor, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
      return request["arguments"]
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
  return None


if __name__ == "__main__":
  warnings.filterwarnings("ignore", message=r".*fork\(\)")
  preload()
  arguments = serve()
  if arguments is not None:
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
