"""How much host memory does loading a full-size official file need? Peak memory over the size of what is loaded.

python -m experiments.full_size --config=flextok:d18_d28_in1k --file=/scratch/random.safetensors [--dtype=bfloat16]

Writes a float32 file of random weights (10 GB for d18-d28) if it does not exist, and loads it in a process of its
own.
"""

import json
import os
import subprocess
import sys
import time

from absl import flags
import numpy as np

from flextok_jax import cli
from flextok_jax.core import tensor_file
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.weights import loading
from flextok_jax.weights.layout import shapes_of
from flextok_jax.weights.official.tokenizer_names import DEFAULT_ROLES, entries, fixed_tables
from flextok_jax.weights.official.writer import to_official

LOAD = """
import json, sys
import jax
import flextok_jax
from flextok_jax.weights import loading  # imported first, so that imports do not count
memory = lambda key: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
before = memory("VmRSS")
model = flextok_jax.load(sys.argv[1], dtype=sys.argv[2])
size = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(json.dumps(dict(before=before, peak=memory("VmHWM"), size=size)))
"""


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  cli.define_config_flag("A tokenizer's config.", values)
  flags.DEFINE_string("file", None, "The official file; written if it does not exist.", flag_values=values)
  flags.DEFINE_string("dtype", "bfloat16", "Type to load it in.", flag_values=values)


def write(path: str, config):
  """Writes an official file of small random numbers, one tensor in memory at a time."""
  shapes, rng = shapes_of(loading.abstract_params(config)), np.random.default_rng(0)
  make = lambda shape: lambda: (rng.random(shape, np.float32) - np.float32(0.5)) * np.float32(0.05)
  tensors = {
    name: (np.dtype(np.float32), entry.official_shape, make(entry.official_shape))
    for entry in entries(shapes, DEFAULT_ROLES)
    for name in entry.names
  }
  tensors |= fixed_tables(make_model(config), DEFAULT_ROLES)
  tensor_file.write(path, tensors, {k: str(v) for k, v in to_official(config).items()})


def main(values: flags.FlagValues):
  """Writes the file if it does not exist, loads it and prints the peak."""
  if values.config is None or not values.file:
    raise ValueError("give --config=NAME and --file=PATH")
  if not os.path.exists(values.file):
    begun = time.monotonic()
    write(values.file, values.config)
    print(f"wrote {values.file}: {os.path.getsize(values.file) / 1e9:.2f} GB in {time.monotonic() - begun:.0f} s")
  begun = time.monotonic()
  command = [sys.executable, "-c", LOAD, values.file, values.dtype]
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout)
  print(f"loaded in {values.dtype}: {result['size'] / 1e9:.3f} GB in {time.monotonic() - begun:.0f} s, with imports")
  for name, peak in (("peak", result["peak"]), ("peak above the imports", result["peak"] - result["before"])):
    print(f"{name}: {peak / 1e9:.3f} GB, {peak / result['size']:.3f} of the size")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
