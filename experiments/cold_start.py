"""How long until the first picture? Seconds from the start of Python, without and with compiled programs in the cache.

python -m experiments.cold_start --checkpoints=glyphs_student,random.safetensors

Each checkpoint is loaded in two processes, one after the other, which share an empty cache: Python and imports, load,
first and second call of tokenize and of detokenize, one picture each. `python -m experiments.full_size` writes a
full-size file of random weights.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from absl import flags

from flextok_jax import cli

RUN = """
import json, sys, time
start, found = float(sys.argv[2]), {}

def took(what):
  global start
  now = time.time()
  found[what], start = now - start, now

import jax
import numpy as np
import flextok_jax
took("imports")
model = jax.block_until_ready(flextok_jax.load(sys.argv[1]))
took("load")
image = np.zeros((1, model.image_size, model.image_size, 3), np.uint8)
for call in ("first", "second"):
  ids = jax.block_until_ready(model.tokenize(image))
  took(f"{call} tokenize")
for call in ("first", "second"):
  jax.block_until_ready(model.detokenize(ids, key=jax.random.key(0), num_steps=1, guidance="none"))
  took(f"{call} detokenize")
print(json.dumps(found))
"""


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_list("checkpoints", ["glyphs_student"], "Tokenizers: anything that load takes.", flag_values=values)


def main(values: flags.FlagValues):
  """Prints a Markdown table."""
  header = None
  for checkpoint in values.checkpoints:
    with tempfile.TemporaryDirectory() as cache:
      environment = {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"
      }  # fmt: skip
      for title in ("empty", "filled"):
        command = [sys.executable, "-c", RUN, checkpoint, str(time.time())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
          raise ValueError(f"{checkpoint}: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout)
        if header is None:
          header = ["checkpoint", "cache", *found]
          print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
        print(f"| {checkpoint} | {title} | " + " | ".join(f"{x:.2f}" for x in found.values()) + " |", flush=True)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
