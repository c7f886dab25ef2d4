"""Runs a command on a platform of JAX: python -m tests.support.on_platform PLATFORM MODULE [ARGUMENT ...].

As with JAX_PLATFORMS=PLATFORM, which JAX reads when it is imported: too early for fork_server.py.
"""

import runpy
import sys

import jax

if __name__ == "__main__":
  del sys.argv[0]
  jax.config.update("jax_platforms", sys.argv.pop(0))
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
