"""Measures speed, memory and FLOPs of every job, on the fast and the plain path in one process.

python -m flextok_jax.benchmark --config=NAME [--jobs=tokenize,train] [--num_tokens=1,8] [--out=FILE.jsonl]

Parameters and inputs are random and the same for both paths; everything runs on the first device. Each round calls each
path once, in alternating order, so that other work on the machine affects both alike. Prints a table and how many times
faster the fast path is; --out receives a JSON line for each row, ratio, span and peak.

FLOPs are those of the matrix products and convolutions that the path runs (flextok_jax/core/flops.py): the fast path
has fewer. MFU is FLOPs / time / peak; the peak is that of the fastest matrix product measured here in the job's dtype.
XLA's own count is printed too: it includes elementwise work, but counts the body of a loop (over blocks, steps, tokens)
once and leaves out kernels of other libraries.

--parity compares results instead: those of this machine's accelerator with those of the plain path on its CPU in
float32; it fails if they are too far apart. --table=DIR prints the JSON lines in a folder as Markdown tables.
launch/accelerator_check.sh runs all of this.

Job "repa" is the step of "train" on latents without REPA, with it, and with its teacher in the step
(flextok_jax/tools/benchmark/repa.py).

Job "loader" reads crops from JPEG files, and trains on them (flextok_jax/tools/loader.py):

python -m flextok_jax.benchmark --config=loader --jobs=loader [--files=512] [--parallel=2]

Job "ar" draws token ids with the guidance of config.ar. Each round also calls the fast program for 1 token and for one,
two and three quarters of them; the differences are the time per token of each span, without the fixed cost of a call.
The untimed round draws a single token.
"""

from collections.abc import Iterable
import json
from pathlib import Path

from absl import flags

from flextok_jax import cli
from flextok_jax.config import with_fields
from flextok_jax.core import files, timing
from flextok_jax.tools import loader
from flextok_jax.tools.benchmark import repa, report
from flextok_jax.tools.benchmark.jobs import PATHS
from flextok_jax.tools.benchmark.run import JOBS, benchmark, jobs_of, parity, read_lines


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags."""
  cli.define_config_flag("The model and its training.", values)
  flags.DEFINE_list(
    "jobs",
    [],
    f"Of {', '.join(JOBS)}, or loader alone; default: all that the config has, except repa.",
    flag_values=values,
  )
  flags.DEFINE_integer("files", 512, "Of job loader: JPEG files.", 1, 100_000, flag_values=values)
  flags.DEFINE_integer("parallel", 2, "Of job loader: threads, and worker processes.", 1, 1024, flag_values=values)
  flags.DEFINE_list("paths", list(PATHS), "plain, fast or both.", flag_values=values)
  flags.DEFINE_list(
    "num_tokens",
    [],
    "Token counts of tokenize, detokenize and ar; default: 1, 8, 32 and all; of ar all.",
    flag_values=values,
  )
  flags.DEFINE_integer("batch_size", 4, "Images per call.", 1, flag_values=values)
  flags.DEFINE_string(
    "dtype", None, "In place of config.dtype; the VAE has its own, config.vae.dtype.", flag_values=values
  )
  flags.DEFINE_bool("latents", True, "Latents in and out, without the VAE; --nolatents: images.", flag_values=values)
  flags.DEFINE_integer("repeats", 5, "Timed rounds, after an untimed one.", 1, flag_values=values)
  flags.DEFINE_float(
    "seconds",
    float("inf"),
    "No round of a job begins after this time; one is timed in any case.",
    0,
    flag_values=values,
  )
  flags.DEFINE_bool("parity", False, "Compare results with the CPU's, in place of times.", flag_values=values)
  flags.DEFINE_string("out", None, "File for the JSON lines, overwritten.", flag_values=values)
  flags.DEFINE_string("table", None, "Only print the files of JSON lines in this folder.", flag_values=values)


def main(values: flags.FlagValues) -> None:
  """Measures with the settings of the flags."""
  if values.table:
    print(report.markdown(read_lines(Path(values.table))))
    return
  if values.config is None:
    raise ValueError("nothing to measure: give --config=NAME")
  out = cli.out_file(values)
  if values.jobs == ["loader"]:
    lines = loader.run(values.config, values.files, values.parallel, values.repeats)
    if out:
      files.write_file(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return
  config = with_fields(values.config, {"dtype": values.dtype or values.config.dtype})
  jobs = _choices("jobs", values.jobs or jobs_of(config), JOBS)
  for job in jobs:
    if job == "repa":
      repa.check(config)
    elif job not in jobs_of(config):
      kind = f"stage {config.stage!r}" + (f", vae.kind {config.vae.kind!r}" if config.stage != "ar" else "")
      raise ValueError(f"--jobs: there is no job {job!r} with {kind}, only {', '.join(jobs_of(config))}")

  def save(rows: list[report.Row], peaks: report.Peaks) -> None:
    if out:
      lines = report.to_json(rows, peaks)
      files.write_file(out, "".join(json.dumps(line) + "\n" for line in lines).encode())

  paths, choices = (
    _choices("paths", values.paths, PATHS),
    dict(num_tokens=cli.numbers("num_tokens", values.num_tokens), batch_size=values.batch_size, latents=values.latents),
  )
  if values.parity:
    compared = parity(config, jobs, paths, **choices)
    if out:
      files.write_file(out, "".join(json.dumps(line) + "\n" for line in compared).encode())
    if failed := [line["job"] for line in compared if not line["passed"]]:
      raise ValueError(f"the results of {', '.join(dict.fromkeys(failed))} differ from those of the CPU: see above")
    return
  rows, peaks = benchmark(config, jobs, paths, repeats=values.repeats, seconds=values.seconds, save=save, **choices)
  print("\n" + report.format_report(rows, peaks) + "\n")
  for (dtype, precision), (start, end) in peaks.items():
    busy = ": other programs were running, MFU is unreliable" if max(start, end) > 1.25 * min(start, end) else ""
    full = ", full precision" if precision else ""
    print(
      f"peak of matrix products in {dtype}{full}: {start / 1e9:.1f} GFLOP/s at the start, {end / 1e9:.1f} at the "
      f"end; MFU is relative to the larger{busy}"
    )
  print("memory: arguments, outputs and temporaries of the compiled program")
  if (peak_bytes := timing.device_peak_bytes()) is not None:
    print(f"peak memory of the process on the device, over all jobs and paths: {peak_bytes / 1e6:.1f} MB")


def _choices(flag: str, items: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the items in the order of `known`; ValueError for an unknown one."""
  for item in items:
    if item not in known:
      raise ValueError(f"--{flag}: unknown {item!r}, one of {', '.join(known)}")
  return tuple(item for item in known if item in items)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
