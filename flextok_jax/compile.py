"""Compiles ahead of time for TPUs or GPUs and reports memory, FLOPs and time. None of them is needed.

python -m flextok_jax.compile --config=NAME --topology=v5e:16x16 --job=train [--per_device_batch=N] [--out=DIR]
python -m flextok_jax.compile --config=NAME --topology=h100:8 --job=train
python -m flextok_jax.compile --config=NAME --topology=v5e:16x16 --job=train --search
python -m flextok_jax.compile --table=DIR

Jobs: "train", the update of python -m flextok_jax.train; "sample", token ids to images with the guidance and steps of
config.sampler; "ar", the generator's loop over tokens with the guidance of config.ar. Each is compiled as the commands
compile it, on the mesh of --config.mesh, by the TPU or the GPU compiler (the extras [tpu] and [cuda]); nothing is
allocated or run. docs/scaling.md explains the numbers. --search tries meshes, remat policies and batches from
--per_device_batch on; --profile lists the kernels that take the most cycles, on TPUs. --out receives a JSON file, and
--table prints those of a folder as a Markdown table, with --profile that of their kinds of kernels.
"""

import json
import os
from pathlib import Path
import re

from absl import flags
import jax
from ml_collections import ConfigDict

from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.tools.compile import report, search
from flextok_jax.tools.compile.jobs import STAGES
from flextok_jax.tools.compile.run import compile_job, read_reports, topology_devices

_DEFAULT_BATCH = 16  # images per device if neither the flag nor a config sets it
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu queries the cloud's metadata server
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it uses no chip, so it needs no lock
  "JAX_NUM_PROCESSES": "1",  # a single process, wherever it runs
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # otherwise the GPU plugin asks for a GPU
  "TF_CPP_MIN_LOG_LEVEL": "2",  # errors only
}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags."""
  cli.define_config_flag("The model, its training and config.mesh.", values)
  flags.DEFINE_string(
    "topology",
    None,
    "TPUs by generation and shape: v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x2; or h100:8.",
    flag_values=values,
  )
  flags.DEFINE_string("job", "train", f"One of {', '.join(STAGES)}.", flag_values=values)
  flags.DEFINE_integer(
    "per_device_batch",
    None,
    f"Images per device; default: for train those of config.data.global_batch, else {_DEFAULT_BATCH}.",
    1,
    flag_values=values,
  )
  flags.DEFINE_integer("num_tokens", None, "Of sample and ar; default: all.", 1, flag_values=values)
  flags.DEFINE_bool("profile", False, "List the kernels with the most cycles.", flag_values=values)
  flags.DEFINE_bool("search", False, "Try meshes, remat policies and batches.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the JSON file.", flag_values=values)
  flags.DEFINE_string("table", None, "Only print the reports in this folder as a Markdown table.", flag_values=values)


def main(values: flags.FlagValues) -> None:
  """Compiles with the settings of the flags and prints the report."""
  if values.table:
    table = report.markdown_kinds if values.profile else report.markdown
    print(table(read_reports(Path(values.table))))
    return
  if values.config is None or not values.topology:
    raise ValueError("give --config=NAME and --topology=v5e:16x16 (or v5p:4x4x4, v6e:16x16, tpu7x:2x2x2, h100:8)")
  if values.job not in STAGES:
    raise ValueError(f"unknown --job={values.job}: one of {', '.join(STAGES)}")
  out = cli.out_folder(values) if values.out else None
  config, name = values.config, cli.config_spec(values).replace(".py", "").rpartition("/")[2]
  devices = topology_devices(values.topology)

  def run(config: ConfigDict, batch: int | None) -> report.CompileReport:
    made = compile_job(config, name, values.job, values.topology, devices, batch, values.num_tokens)
    if values.search:
      print(search.format_search([made]), flush=True)
    return made

  batch = values.per_device_batch
  if batch is None and (values.search or values.job != "train"):
    batch = _DEFAULT_BATCH
  if values.search:
    reports = search.search(config, values.job, len(devices), batch, run)
    print("\nfastest first:\n" + search.format_search(reports) + "\n")
  else:
    reports = [run(config, batch)]
  best = reports[0]
  print(report.format_report(best, values.profile))
  if out:
    parts = (re.sub(r"[^\w-]+", "_", part) for part in (name, values.job, values.topology))
    path = out / f"{'.'.join(parts)}.json"
    rows = [made.to_json() for made in reports]
    files.write_file(path, (json.dumps({**rows[0], "tried": rows[1:]}, indent=1) + "\n").encode())
    print(f"wrote {path}")
  if not best.fits:
    used, limit = (best.memory[part] / 1e9 for part in ("total", "limit"))
    raise ValueError(
      f"{name} does not fit: {used:.1f} GB for {limit:.1f} GB per device; lower --per_device_batch, raise "
      "config.mesh.fsdp, or set config.remat to 'full'"
    )


if __name__ == "__main__":
  os.environ.update(_ENVIRONMENT)
  jax.config.update("jax_platforms", "cpu")  # accelerators, if there are any, are not used
  jax.config.update("jax_enable_compilation_cache", False)  # the compiler dumps nothing for cached programs
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
