"""Results of the benchmark as a table and as JSON."""

from collections.abc import Iterable, Mapping
import dataclasses
import itertools
import statistics

import jax

from flextok_jax.core import timing
from flextok_jax.core.tables import markdown_table
from flextok_jax.tools.benchmark import repa
from flextok_jax.tools.benchmark.jobs import TEACHER, Compute, Row

Peaks = dict[Compute, list[float]]  # FLOP/s of the fastest matrix product, each time that it was measured

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


_PARITY = ("device", "what", "job", "path", "dtype", "attention", "error", "at most", "")
_TIMES = (
  "device",
  "what",
  "job",
  "path",
  "dtype",
  "attention",
  "images per call",
  "ms per call",
  "images per second",
  "MFU",
  "program, MB",
  "peak on the device, MB",
  "compilation, s",
)


def ratios(rows: Iterable[Row]) -> list[dict]:
  """Returns how many times faster the fast path is than the plain one, or a student than its teacher, if both ran.

  The ratio is that of the medians, with the range over the rounds.
  """
  is_slow = lambda row: row.path == "plain" or (row.job, row.path) == ("detokenize", TEACHER)
  slow, result = {row.name: row for row in rows if is_slow(row)}, []
  for row in rows:
    if row.name in slow and row is not (base := slow[row.name]):
      pairs = [b / s for b, s in zip(base.seconds, row.seconds)]
      result.append(
        {
          "kind": "ratio",
          "job": row.job,
          "num_tokens": row.num_tokens,
          "path": row.path,
          "over": base.path,
          "rounds": len(pairs),
          "times_as_fast": row.rates[0] / base.rates[0],
          "min": min(pairs),
          "max": max(pairs),
          "same_program": row.program == base.program,
        }
      )
  return result


def spans(rows: Iterable[Row]) -> list[dict]:
  """Returns the time per token between successive counts, if calls for fewer tokens were timed: median and range."""
  result = []
  for row in rows:
    calls: dict = {**row.shorter, row.num_tokens: row.seconds}
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


def to_json(rows: list[Row], peaks: Peaks) -> list[dict]:
  """Returns rows, ratios, spans, costs and peaks as JSON objects, distinguished by the field "kind"."""
  device = {"platform": jax.devices()[0].platform, "device": jax.devices()[0].device_kind}
  lines = []
  for row in rows:
    fields, peak = dataclasses.asdict(row), max(peaks[row.compute])
    speed: dict = dict(zip(("images_per_second", "images_per_second_min", "images_per_second_max"), row.rates))
    rate = row.flops_per_second
    speed |= {"flops_per_second": rate, "peak_flops_per_second": peak, "mfu": rate / peak}
    speed["ms_per_token"] = row.ms_per_token
    dtype, precision = fields.pop("compute")
    lines.append({"kind": "row", **fields, "dtype": dtype, "precision": precision, **speed, **device})
  lines += ratios(rows) + spans(rows) + repa.costs(rows)
  for (dtype, precision), measured in peaks.items():
    lines.append({"kind": "peak", "dtype": dtype, "precision": precision, "flops_per_second": measured, **device})
  return lines


def format_report(rows: list[Row], peaks: Peaks) -> str:
  """Returns a table of the rows (images/s: median and range; FLOPs per call) and, below it, lines with the ratios."""
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
      f"{name}: {r['path']} is {r['times_as_fast']:.2f} times as fast as {r['over']} "
      f"({r['min']:.2f} .. {r['max']:.2f} in {r['rounds']} rounds{same})"
    )
  for c in repa.costs(rows):
    lines.append(
      f"repa, {c['path']}: a step takes {c['over_off']:.3f} times as long as without ({c['min']:.3f} .. "
      f"{c['max']:.3f} in {c['rounds']} rounds); FLOPs {c['flops_over_off']:.3f} times"
    )
  for row in rows:
    if row.ms_per_token is not None:
      lines.append(f"{row.name}, {row.path}: {timing.digits(row.ms_per_token)} ms per token" + _span_text(row))
  return "\n".join(lines)


def markdown(reports: Mapping[str, Iterable[dict]]) -> str:
  """Returns Markdown tables of JSON lines: results compared, and times.

  Args:
    reports: lines of to_json and of parity.compare, by what was measured.
  """
  compared: list[list[str]] = []
  timed: list[list[str]] = []
  megabytes = lambda size: "?" if size is None else timing.digits(size / 1e6)
  for what, lines in reports.items():
    for line in lines:
      if line["kind"] not in ("parity", "row"):
        continue
      job = line["job"] + (f", {line['num_tokens']} tokens" if line["num_tokens"] else "")
      cells = [line["device"], what, job, line["path"], line["dtype"], line["attention"]]
      if line["kind"] == "parity":
        error, bound = (f"{100 * line[field]:.3g}%" for field in ("error", "bound"))
        verdict = "passed" if line["passed"] else "**failed**"
        compared.append(
          [*cells, error + (" of ids differ" if line["of"] == "ids" else " of the largest"), bound, verdict]
        )
      else:
        speed = timing.digits(1e3 * statistics.median(line["seconds"])), timing.digits(line["images_per_second"])
        memory = megabytes(line["program_bytes"]), megabytes(line["device_peak_bytes"])
        cells += [str(line["batch_size"]), *speed, f"{line['mfu']:.1%}", *memory, f"{line['compile_seconds']:.1f}"]
        timed.append(cells)
  both = (_PARITY, compared), (_TIMES, timed)
  return "\n\n".join(markdown_table(header, rows) for header, rows in both if rows)


def _span_text(row: Row) -> str:
  """Returns the time per token of each span and the rate at which its bytes are read; "" if no spans were timed."""
  parts = [f"{timing.digits(span['ms_per_token'])} from {span['from']} to {span['to']}" for span in spans([row])]
  if not parts or not row.token_bytes or not row.ms_per_token:
    return ""
  rate = row.token_bytes / row.ms_per_token / 1e6
  read = f"reads {timing.digits(row.token_bytes / 1e6)} MB of weights and caches at least, {timing.digits(rate)} GB/s"
  return f" ({', '.join(parts)}); each {read}"
