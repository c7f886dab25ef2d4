"""Compiles a job ahead of time for a topology of TPUs or GPUs."""

import json
import math
from pathlib import Path
import resource
import tempfile
import time

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from flextok_jax import stages
from flextok_jax.config import with_fields
from flextok_jax.core import accelerators
from flextok_jax.ops import attention
from flextok_jax.parallel import sharding
from flextok_jax.tools.compile import gpu, report
from flextok_jax.tools.compile.jobs import make_job
from flextok_jax.training import plan


def read_reports(folder: Path) -> list[dict]:
  """Returns the reports in a folder, in the order of their file names.

  Raises:
    FileNotFoundError: there is none.
    ValueError: another file is among them.
  """
  paths = sorted(folder.glob("*.json"))
  if not paths:
    raise FileNotFoundError(f"no reports (.json) in {folder}: write some with --out={folder}")
  reports = []
  for path in paths:
    try:
      reports.append(json.loads(path.read_bytes()))
      report.markdown(reports[-1:])
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
      raise ValueError(f"{path} is not a report of flextok_jax.compile: {type(e).__name__}: {e}") from None
  return reports


def topology_devices(topology: str) -> list[jax.Device]:
  """Returns the devices of a topology such as "v5e:16x16" or "h100:8"; no TPU or GPU is needed.

  Raises:
    ValueError: the compiler is not installed, or the topology is unknown.
  """
  if topology.startswith("h100"):
    return gpu.devices(topology)
  try:
    return list(topologies.get_topology_desc(topology, "tpu").devices)
  except RuntimeError as e:  # JAX's own errors are RuntimeErrors
    if "not installed" in str(e):
      raise ValueError('the TPU compiler is missing: pip install "flextok-jax[tpu]"') from e
    raise ValueError(
      f"topology={topology}: {e}; known are v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x2, their parts and multiples, "
      "and h100:8"
    ) from e


def compile_job(
  config: ConfigDict,
  name: str,
  job_name: str,
  topology: str,
  devices: list[jax.Device],
  batch: int | None,
  num_tokens: int | None,
) -> report.CompileReport:
  """Compiles a job and returns its report, which says so if the job does not fit into memory.

  Args:
    config: of a stage that has the job; its mesh is over the devices.
    name: of the config, for the report.
    job_name: a key of jobs.STAGES.
    topology: of the devices, for the report.
    devices: of topology_devices.
    batch: images per device; None: those of config.data.global_batch.
    num_tokens: of the jobs "sample" and "ar"; None: all.

  Raises:
    ValueError: a device of unknown kind, or as make_job.
  """
  accelerator = accelerators.known(devices[0])
  if accelerator is None:
    raise ValueError(f"no figures of {devices[0].device_kind!r} in flextok_jax/core/accelerators.py: add them there")
  if batch is not None:
    config = with_fields(config, {"data.global_batch": batch * len(devices)})
  fitting = plan.choose(config, devices, None if job_name == "train" else math.inf)
  mesh = sharding.make_mesh(**fitting.axes, devices=devices)
  stages.check_mesh(config, mesh)
  with jax.default_device(devices[0]):  # the device that attention is chosen for
    job = make_job(config, job_name, mesh, batch, num_tokens, fitting.shard_update)
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
  if not report.arguments_fit(job, accelerator):
    return report.too_large(settings, job, accelerator)
  begun = time.perf_counter()
  lowered = job.lower()
  settings["lower_seconds"] = time.perf_counter() - begun
  try:
    compiled, text = _compile(lowered, gpu.OPTIONS if devices[0].platform == "gpu" else {})
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return report.too_large(settings, job, accelerator, e)
  settings["compile_seconds"] = time.perf_counter() - begun - settings["lower_seconds"]
  settings["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return report.make_report(settings, job, compiled, text, accelerator, mesh)


def _compile(lowered, options: dict) -> tuple[jax.stages.Compiled, str]:
  """Returns the compiled program and its HLO; options are the compiler's.

  The HLO is the compiler's own dump: JAX's as_text() fails on the output of newer compilers and lacks the cycles.
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({**options, "xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    names = "*.after_codegen.txt", "*.sm_*_gpu_after_optimizations.txt"  # of TPUs, of GPUs
    (path,) = (path for name in names for path in Path(folder).glob(name))
    return compiled, path.read_text()
