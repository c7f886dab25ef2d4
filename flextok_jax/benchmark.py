"""Measures speed, memory and FLOPs of every job, the fast path beside the plain one in one process.

python -m flextok_jax.benchmark --config=NAME [--jobs=tokenize,train] [--num_tokens=1,8] [--out=FILE.jsonl]

Parameters and inputs are random and the same for both paths; all runs on the first device. A round calls each path
once, and their order turns from round to round, so that whatever else the machine does meets both. Prints a table, and
how many times faster the fast path is; --out gets a JSON line for each row, ratio, span and peak.

FLOPs are those of the matrix products and convolutions that the path really runs (flextok_jax/core/flops.py):
the fast path has fewer. MFU is FLOPs / time / peak, and the peak that of the fastest matrix product measured here in
the job's dtype. XLA's own count stands beside: it has elementwise work too, but the body of a loop (over blocks, steps,
tokens) only once, and nothing of other libraries' kernels.

Job "repa" is the step of "train" on latents without REPA, with it, and with its teacher in the step
(flextok_jax/tools/benchmark/repa.py).

Job "ar" draws token ids with the guidance of config.ar. A round also calls the fast program for 1 token and for one,
two and three quarters of them; the differences say what a token of each span costs, whatever a call costs before the
first. Its round that is not timed draws a single token.
"""

from collections.abc import Iterable
import dataclasses
import functools
import itertools
import json
from pathlib import Path
import statistics

from absl import flags
import jax
from ml_collections import ConfigDict

from flextok_jax import cli
from flextok_jax.core import files, timing
from flextok_jax.inference import decoding
from flextok_jax.tools.benchmark import generator as benchmark_ar
from flextok_jax.tools.benchmark import repa as benchmark_repa
from flextok_jax.tools.benchmark.jobs import PATHS, Compute, Row

JOBS = ("tokenize", "detokenize", "vae", "ar", "train", "repa")  # in the order in which they run

_TABLE = (
  "job",
  "tokens",
  "path",
  "images/s",
  "(min .. max)",
  "compile s",
  "GFLOP",
  "by XLA",
  "GFLOP/s",
  "MFU",
  "memory MB",
  "attention",
)


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  cli.define_config_flag("The model and its training.", values)
  flags.DEFINE_list(
    "jobs", [], f"Of {', '.join(JOBS)}; default: all that the config has, but repa.", flag_values=values
  )
  flags.DEFINE_list("paths", list(PATHS), "plain, fast or both.", flag_values=values)
  flags.DEFINE_list(
    "num_tokens",
    [],
    "Token counts of tokenize, detokenize and ar; default: 1, 8, 32 and all; of ar all.",
    flag_values=values,
  )
  flags.DEFINE_integer("batch_size", 4, "Images a call.", flag_values=values)
  flags.DEFINE_string(
    "dtype", None, "In place of config.dtype; the VAE has its own, config.vae.dtype.", flag_values=values
  )
  flags.DEFINE_bool("latents", True, "Latents in and out, without the VAE; --nolatents: images.", flag_values=values)
  flags.DEFINE_integer("repeats", 5, "Timed rounds, after one that is not timed.", flag_values=values)
  flags.DEFINE_float(
    "seconds", float("inf"), "Begins no round of a job after so long; one is timed in any case.", flag_values=values
  )
  flags.DEFINE_string("out", None, "File for the JSON lines, written anew.", flag_values=values)


def main(values: flags.FlagValues):
  """Measures what the flags ask for."""
  if values.config is None:
    raise ValueError("nothing to measure: give --config=NAME")
  for name, least in (("batch_size", 1), ("repeats", 1), ("seconds", 0)):
    if not values[name].value >= least:
      raise ValueError(f"--{name}={values[name].value} must be at least {least}")
  config = values.config.copy_and_resolve_references()
  config.dtype = values.dtype or config.dtype
  jobs = _choices("jobs", values.jobs or jobs_of(config), JOBS)
  for job in jobs:
    if job == "repa":
      benchmark_repa.check(config)
    elif job not in jobs_of(config):
      kind = f"stage {config.stage!r}" + (f", vae.kind {config.vae.kind!r}" if config.stage != "ar" else "")
      raise ValueError(f"--jobs: there is no job {job!r} with {kind}, only {', '.join(jobs_of(config))}")
  counts = token_counts(values.num_tokens, config)
  make = benchmark_ar.Benchmark if config.stage == "ar" else benchmark_repa.Benchmark
  bench = make(config, _choices("paths", values.paths, PATHS), values.batch_size, values.latents)

  # Rows are written as they come, so that a run cut short leaves what it has measured.
  save = functools.partial(_write, Path(values.out)) if values.out else lambda rows, peaks: None
  computes = sorted({bench.compute(job) for job in jobs}, key=str)
  peaks = {c: [timing.matmul_peak(*c)] for c in computes}
  rows = []
  for job in jobs:
    for count in counts if job in ("tokenize", "detokenize", "ar") else (None,):
      for row in bench.run(job, count, values.repeats, values.seconds):
        rows.append(row)
        print(f"measured {row.name}, {row.path}: {timing.digits(row.rates[0])} images/s", flush=True)
      save(rows, peaks)
  for c in computes:
    peaks[c].append(timing.matmul_peak(*c))
  save(rows, peaks)
  print("\n" + format_report(rows, peaks) + "\n")
  for (dtype, precision), (start, end) in peaks.items():
    busy = ": the machine was busy, MFU tells little" if max(start, end) > 1.25 * min(start, end) else ""
    full = ", full precision" if precision else ""
    print(
      f"peak of matrix products in {dtype}{full}: {start / 1e9:.1f} GFLOP/s at the start, {end / 1e9:.1f} at the "
      f"end; MFU is of the larger{busy}"
    )
  print("memory: arguments, outputs and temporaries of the compiled program")
  if (held := timing.device_peak_bytes()) is not None:
    print(f"most that the process ever held on the device, in all jobs and paths: {held / 1e6:.1f} MB")


def jobs_of(config: ConfigDict) -> tuple[str, ...]:
  """Returns the jobs that a config has."""
  if config.stage != "tokenizer":
    return (config.stage, "train")
  return tuple(job for job in ("tokenize", "detokenize", "vae", "train") if job != "vae" or config.vae.kind != "pixels")


def token_counts(requested: Iterable[str], config: ConfigDict) -> tuple[int, ...]:
  """Returns the counts of --num_tokens, ascending; by default 1, 8, 32 and all of a tokenizer, all of a generator.

  Raises:
    ValueError: no whole number, or more than the model has, or none.
  """
  if config.stage == "vae":
    return ()
  counts = cli.numbers("num_tokens", requested)
  if config.stage == "ar":
    return decoding.token_counts(counts or [config.ar.num_tokens], config.ar.num_tokens)
  total = config.tokens.num_registers
  return decoding.token_counts(counts or [k for k in (1, 8, 32) if k < total] + [total], total)


def _choices(flag: str, items: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the items, in the order of `known`; ValueError for one that is not there."""
  for item in items:
    if item not in known:
      raise ValueError(f"--{flag}: unknown {item!r}, one of {', '.join(known)}")
  if not items:
    raise ValueError(f"--{flag} is empty: give some of {', '.join(known)}")
  return tuple(item for item in known if item in items)


def ratios(rows: Iterable[Row]) -> list[dict]:
  """Returns how many times faster the fast path is where both ran: of the medians, and least and most in a round."""
  plain, result = {row.name: row for row in rows if row.path == "plain"}, []
  for row in rows:
    if row.path == "fast" and row.name in plain:
      pairs = [p / f for p, f in zip(plain[row.name].seconds, row.seconds)]
      result.append(
        {
          "kind": "ratio",
          "job": row.job,
          "num_tokens": row.num_tokens,
          "rounds": len(pairs),
          "fast_over_plain": row.rates[0] / plain[row.name].rates[0],
          "min": min(pairs),
          "max": max(pairs),
          "same_program": row.program == plain[row.name].program,
        }
      )
  return result


def spans(rows: Iterable[Row]) -> list[dict]:
  """Returns what a token costs from one count to the next where calls for fewer tokens were timed: median and range."""
  result = []
  for row in rows:
    calls = {**row.shorter, row.num_tokens: row.seconds}
    for low, high in itertools.pairwise(calls) if row.shorter else ():
      each = [1e3 * (b - a) / (high - low) for a, b in zip(calls[low], calls[high])]
      result.append(
        {
          "kind": "span",
          "job": row.job,
          "path": row.path,
          "num_tokens": row.num_tokens,
          "from": low,
          "to": high,
          "ms_per_token": statistics.median(each),
          "min": min(each),
          "max": max(each),
          "rounds": len(each),
        }
      )
  return result


def _write(path: Path, rows: list[Row], peaks: dict[Compute, list[float]]):
  """Writes rows, ratios, spans and peaks, a JSON object a line; the field "kind" tells them apart."""
  device = {"platform": jax.devices()[0].platform, "device": jax.devices()[0].device_kind}
  lines = []
  for row in rows:
    fields, peak = dataclasses.asdict(row), max(peaks[row.compute])
    speed = dict(zip(("images_per_second", "images_per_second_min", "images_per_second_max"), row.rates))
    rate = row.flops_per_second
    speed |= {"flops_per_second": rate, "peak_flops_per_second": peak, "mfu": rate / peak}
    speed["ms_per_token"] = row.ms_per_token
    dtype, precision = fields.pop("compute")
    lines.append({"kind": "row", **fields, "dtype": dtype, "precision": precision, **speed, **device})
  lines += ratios(rows) + spans(rows) + benchmark_repa.costs(rows)
  for (dtype, precision), measured in peaks.items():
    lines.append({"kind": "peak", "dtype": dtype, "precision": precision, "flops_per_second": measured, **device})
  files.write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def format_report(rows: list[Row], peaks: dict[Compute, list[float]]) -> str:
  """Returns a table of the rows (images/s: the median and its range; FLOPs of a call), and the ratios below."""
  cells = [_TABLE]
  for row in rows:
    rate, least, most = map(timing.digits, row.rates)
    unknown = lambda value, scale: "?" if value is None else timing.digits(value / scale)
    cells.append(
      (
        row.job,
        str(row.num_tokens or ""),
        row.path,
        rate,
        f"({least} .. {most})",
        f"{row.compile_seconds:.1f}",
        timing.digits(row.flops / 1e9),
        unknown(row.xla_flops, 1e9),
        timing.digits(row.flops_per_second / 1e9),
        f"{row.flops_per_second / max(peaks[row.compute]):.1%}",
        unknown(row.program_bytes, 1e6),
        row.attention,
      )
    )
  widths = [max(map(len, column)) for column in zip(*cells)]
  sides = [str.ljust if name in ("job", "path", "attention") else str.rjust for name in _TABLE]
  lines = ["  ".join(side(c, w) for side, c, w in zip(sides, line, widths)).rstrip() for line in cells]
  for r in ratios(rows):
    name = r["job"] + (f" k={r['num_tokens']}" if r["num_tokens"] else "")
    same = "; they are the same program" if r["same_program"] else ""
    lines.append(
      f"{name}: fast is {r['fast_over_plain']:.2f} times as fast as plain "
      f"({r['min']:.2f} .. {r['max']:.2f} in {r['rounds']} rounds{same})"
    )
  for c in benchmark_repa.costs(rows):
    lines.append(
      f"repa, {c['path']}: a step takes {c['over_off']:.3f} times as long as without ({c['min']:.3f} .. "
      f"{c['max']:.3f} in {c['rounds']} rounds); FLOPs {c['flops_over_off']:.3f} times"
    )
  for row in rows:
    if row.ms_per_token is not None:
      lines.append(f"{row.name}, {row.path}: {timing.digits(row.ms_per_token)} ms a token" + _span_text(row))
  return "\n".join(lines)


def _span_text(row: Row) -> str:
  """What a token of each span costs, and how fast its bytes are read; "" where no spans were timed."""
  parts = [f"{timing.digits(span['ms_per_token'])} from {span['from']} to {span['to']}" for span in spans([row])]
  if not parts:
    return ""
  rate = row.token_bytes / row.ms_per_token / 1e6
  read = f"reads {timing.digits(row.token_bytes / 1e6)} MB of weights and caches at least, {timing.digits(rate)} GB/s"
  return f" ({', '.join(parts)}); each {read}"


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
