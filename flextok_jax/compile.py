"""Compiles a job for TPUs that need not be there, and tells what it will take of them.

python -m flextok_jax.compile --config=NAME --topology=v5e:16x16 --job=train [--per_device_batch=N] [--out=DIR]
python -m flextok_jax.compile --config=NAME --topology=v5e:16x16 --job=train --search
python -m flextok_jax.compile --table=DIR

Jobs: "train", the update of python -m flextok_jax.train; "sample", token ids to images with the guidance and steps of
config.sampler; "ar", the generator's loop over tokens with the guidance of config.ar. Each is compiled as the commands
compile it, on the mesh of --config.mesh, by the TPUs' own compiler (the extra [tpu]); nothing is allocated, nothing
runs. docs/scaling.md says what the numbers mean. --search tries meshes, remat policies and batches from
--per_device_batch on; --out gets a JSON file, of which --table makes a Markdown table.
"""

import json
import os
from pathlib import Path
import re
import resource
import tempfile
import time

from absl import flags
import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from flextok_jax import cli
from flextok_jax.core import accelerators, files
from flextok_jax.ops import attention
from flextok_jax.parallel import sharding
from flextok_jax.tools.compile import report as compile_report
from flextok_jax.tools.compile import search as compile_search
from flextok_jax.tools.compile.jobs import STAGES, make_job

_DEFAULT_BATCH = 16  # images a device where neither the flag nor a config says it
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks the cloud's metadata server for its neighbours
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it takes no chip, so needs no lock on them
  "JAX_NUM_PROCESSES": "1",  # this process is alone, wherever it runs
  "TF_CPP_MIN_LOG_LEVEL": "2",  # errors only
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  cli.define_config_flag("The model, its training and config.mesh.", values)
  flags.DEFINE_string(
    "topology", None, "TPUs by generation and shape: v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x2.", flag_values=values
  )
  flags.DEFINE_string("job", "train", f"One of {', '.join(STAGES)}.", flag_values=values)
  flags.DEFINE_integer(
    "per_device_batch",
    None,
    f"Images a device; default: for train those of config.data.global_batch, else {_DEFAULT_BATCH}.",
    flag_values=values,
  )
  flags.DEFINE_integer("num_tokens", None, "Of sample and ar; default: all.", flag_values=values)
  flags.DEFINE_bool("search", False, "Tries meshes, remat policies and batches.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the JSON file.", flag_values=values)
  flags.DEFINE_string("table", None, "Only prints the reports in this folder as a Markdown table.", flag_values=values)


def main(values: flags.FlagValues):
  """Compiles what the flags ask for and prints the report."""
  if values.table:
    print(compile_report.markdown(read_reports(Path(values.table))))
    return
  if values.config is None or not values.topology:
    raise ValueError("give --config=NAME and --topology=v5e:16x16 (or v5p:4x4x4, v6e:16x16, tpu7x:2x2x2)")
  if values.job not in STAGES:
    raise ValueError(f"unknown --job={values.job}: one of {', '.join(STAGES)}")
  config, name = values.config, cli.config_spec(values).replace(".py", "").rpartition("/")[2]
  devices = describe(values.topology)

  def run(config: ConfigDict, batch: int | None) -> compile_report.Report:
    report = compile_job(config, name, values.job, values.topology, devices, batch, values.num_tokens)
    if values.search:
      print(compile_search.format_search([report]), flush=True)
    return report

  batch = values.per_device_batch
  if batch is None and (values.search or values.job != "train"):
    batch = _DEFAULT_BATCH
  if values.search:
    reports = compile_search.search(config, values.job, len(devices), batch, run)
    print("\nfastest first:\n" + compile_search.format_search(reports) + "\n")
  else:
    reports = [run(config, batch)]
  best = reports[0]
  print(compile_report.format_report(best))
  if values.out:
    parts = (re.sub(r"[^\w-]+", "_", part) for part in (name, values.job, values.topology))
    path = Path(values.out) / f"{'.'.join(parts)}.json"
    rows = [report.to_json() for report in reports]
    files.write_file(path, (json.dumps({**rows[0], "tried": rows[1:]}, indent=1) + "\n").encode())
    print(f"wrote {path}")
  if not best.fits:
    used, limit = (best.memory[part] / 1e9 for part in ("total", "limit"))
    raise ValueError(
      f"{name} does not fit: {used:.1f} GB for {limit:.1f} GB a device; lower --per_device_batch, raise "
      "config.mesh.fsdp, or set config.remat to 'full'"
    )


def read_reports(folder: Path) -> list[dict]:
  """Returns the reports that --out left in a folder, by name.

  Raises:
    FileNotFoundError: there is none.
  """
  paths = sorted(folder.glob("*.json"))
  if not paths:
    raise FileNotFoundError(f"no reports (.json) in {folder}: make some with --out={folder}")
  return [json.loads(path.read_text()) for path in paths]


def describe(topology: str) -> list[jax.Device]:
  """Returns the devices of TPUs that need not be there.

  Raises:
    ValueError: no libtpu, or no such TPUs.
  """
  try:
    return list(topologies.get_topology_desc(topology, "tpu").devices)
  except RuntimeError as e:  # jax's own errors are such, too
    if "not installed" in str(e):
      raise ValueError('the compiler of TPUs is missing: pip install "flextok-jax[tpu]"') from e
    raise ValueError(
      f"--topology={topology}: {e}; known are v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x2 and their "
      "parts and multiples"
    ) from e


def compile_job(
  config: ConfigDict,
  name: str,
  job_name: str,
  topology: str,
  devices: list[jax.Device],
  batch: int | None,
  num_tokens: int | None,
) -> compile_report.Report:
  """Compiles a job for described devices; a report of what does not fit, where it does not.

  Raises:
    ValueError: a device of unknown kind, or as of make_job.
  """
  accelerator = accelerators.known(devices[0])
  if accelerator is None:
    raise ValueError(f"no figures of {devices[0].device_kind!r} in flextok_jax/core/accelerators.py: add them there")
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  with jax.default_device(devices[0]):  # where attention asks whether it can run
    job = make_job(config, job_name, mesh, batch, num_tokens)
  head_dim = config.ar.head_dim if config.stage == "ar" else config.decoder.head_dim
  settings = {
    "config": name,
    "job": job_name,
    "topology": topology,
    "devices": mesh.size,
    "kind": devices[0].device_kind,
    "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
    "per_device_batch": job.batch / mesh.size,
    "global_batch": job.batch,
    "num_tokens": num_tokens,
    "remat": config.remat,
    "attention": attention.choose_implementation(config.attention, head_dim, config.dtype, devices[0]),
  }
  if report := compile_report.too_large(settings, job, accelerator):
    return report
  begun = time.perf_counter()
  lowered = job.lower()
  settings["lower_seconds"] = time.perf_counter() - begun
  try:
    compiled, text = _compile(lowered)
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return compile_report.too_large(settings, job, accelerator, e)
  settings["compile_seconds"] = time.perf_counter() - begun - settings["lower_seconds"]
  settings["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return compile_report.make_report(settings, job, compiled, text, accelerator, mesh)


def _compile(lowered) -> tuple[jax.stages.Compiled, str]:
  """Returns the compiled program and its HLO.

  The text is the compiler's own dump: jax's as_text() refuses what newer compilers write, and lacks their cycles.
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    (path,) = Path(folder).glob("*.after_codegen.txt")
    return compiled, path.read_text()


if __name__ == "__main__":
  os.environ.update(_ENVIRONMENT)
  jax.config.update("jax_platforms", "cpu")  # TPUs, if there are any, are left alone
  jax.config.update("jax_enable_compilation_cache", False)  # from there the compiler would dump nothing
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
