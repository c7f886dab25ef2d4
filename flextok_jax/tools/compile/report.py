"""Report on a compiled job: memory, FLOPs and traffic of a device, and the time of a step estimated from them."""

from collections import Counter
from collections.abc import Iterable
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from flextok_jax.core import timing
from flextok_jax.core.accelerators import Accelerator
from flextok_jax.core.tables import markdown_table
from flextok_jax.tools.compile import hlo, profile
from flextok_jax.tools.compile import kernels as attention_kernels
from flextok_jax.tools.compile import traffic as hlo_traffic
from flextok_jax.tools.compile.jobs import Job

LONGEST = 25  # kernels in a report
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class CompileReport:
  """A job on a mesh of devices. Bytes, FLOPs and seconds are per device and call."""

  settings: dict[str, Any]  # what was compiled: config, job, topology, mesh, batch, ...
  fits: bool
  memory: dict[str, int]  # bytes by part; "total", and "limit" of the device
  flops: dict[str, float] = dataclasses.field(default_factory=dict)
  collectives: list[dict] = dataclasses.field(default_factory=list)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by resource, if nothing else limited the job
  notes: tuple[str, ...] = ()
  kinds: list[dict] = dataclasses.field(default_factory=list)  # of kernels, as of profile.by_kind
  kernels: list[dict] = dataclasses.field(default_factory=list)  # those with the most cycles, as profile.Kernel

  @property
  def bound(self) -> str:
    """The resource that takes the longest, of compute, memory and interconnect: the roofline."""
    return max(("compute", "memory", "interconnect"), key=lambda name: self.seconds[name])

  @property
  def step_seconds(self) -> float:
    """The estimate: the roofline, or the compiler's schedule if that is longer."""
    return max(self.seconds.values())

  @property
  def mfu(self) -> float:
    """Model FLOPs, without those that remat recomputes, over the estimated time and the peak."""
    return self.flops["model"] / self.flops["peak"] / self.step_seconds

  @property
  def mfu_roofline(self) -> float:
    """The same with the roofline as the time: an upper bound."""
    return self.flops["model"] / self.flops["peak"] / self.seconds[self.bound]

  @property
  def images_per_second(self) -> float:
    """Of all devices."""
    return self.settings["global_batch"] / self.step_seconds

  def to_json(self) -> dict:
    """Returns a dict for a JSON file: the fields and the properties."""
    fields = dataclasses.asdict(self)
    if self.fits:
      derived = ("bound", "step_seconds", "mfu", "mfu_roofline", "images_per_second")
      fields |= {name: getattr(self, name) for name in derived}
    return fields


def local_bytes(tree) -> int:
  """Returns the bytes per device of a tree of arrays or shapes with shardings."""
  one = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(map(one, jax.tree.leaves(tree)))


def memory(job: Job, stats, limit: float) -> dict[str, int]:
  """Returns the bytes in a device's memory by part; `stats` is that of compiled.memory_analysis().

  Donated arguments are counted once, as arguments. "padding" is what the compiler's layout adds to the arguments.
  """
  parts = {name: local_bytes(tree) for name, tree in job.parts.items()}
  parts = {name: size for name, size in parts.items() if size}
  parts["padding"] = stats.argument_size_in_bytes - sum(parts.values())
  parts["outputs"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
  parts["temporaries"] = stats.temp_size_in_bytes
  parts["code"] = stats.generated_code_size_in_bytes
  return {**parts, "total": sum(parts.values()), "limit": int(limit)}


def make_report(settings: dict, job: Job, compiled, text: str, accelerator: Accelerator, mesh) -> CompileReport:
  """Returns the report of a compiled job from its HLO."""
  module = hlo.Module(text, job.loop_trips)
  sent = hlo_traffic.collectives(module, mesh.size)
  attention: Counter[attention_kernels.Kernel] = Counter()
  for run in module.runs():
    if kernel := attention_kernels.find(run):
      attention[kernel] += run.times
  kernels = profile.kernels(module, attention_kernels.cycles(list(attention), settings["topology"]))
  custom = hlo.custom_kernels(module)
  flops = {
    "analytic": job.flops / mesh.size,
    "model": job.model_flops / mesh.size,
    "compiled": hlo.matmul_flops(module) + sum(kernel.flops * times for kernel, times in attention.items()),
    "compiled_loops_once": timing.xla_flops(compiled),
    "peak": accelerator.flops,
  }
  seconds = {
    "compute": flops["analytic"] / accelerator.flops,
    "memory": hlo_traffic.memory_bytes(module) / accelerator.bandwidth,
    "interconnect": sum(link_seconds(c, accelerator, mesh) for c in sent),
  }
  if kernels and accelerator.clock:
    seconds["schedule"] = sum(kernel.cycles for kernel in kernels) / accelerator.clock
  notes = []
  if custom:
    notes.append(f"{custom} runs of cuDNN's attention, whose products the compiled FLOPs do not include")
  if module.unknown_loops:
    notes.append(f"{module.unknown_loops} data-dependent loops: {job.loop_trips} trips assumed")
  table = memory(job, compiled.memory_analysis(), accelerator.memory)
  return CompileReport(
    settings,
    table["total"] <= table["limit"],
    table,
    flops,
    _summed(sent),
    seconds,
    tuple(notes),
    [row | {"peak": row["cycles"] * accelerator.flops / accelerator.clock} for row in profile.by_kind(kernels)],
    [dataclasses.asdict(kernel) for kernel in kernels[:LONGEST]],
  )


def arguments_fit(job: Job, accelerator: Accelerator) -> bool:
  """Returns whether the arguments of a job fit into memory."""
  return sum(local_bytes(tree) for tree in job.parts.values()) <= accelerator.memory


def too_large(settings: dict, job: Job, accelerator: Accelerator, error: Exception | None = None) -> CompileReport:
  """Returns the report of a job that does not fit.

  Args:
    settings: of the report.
    job: the job.
    accelerator: of the devices.
    error: of the compiler when it ran out of the device's memory; None: nothing was compiled.
  """
  parts = {name: local_bytes(tree) for name, tree in job.parts.items()}
  notes: tuple[str, ...] = ()
  if error is not None:
    notes = (str(error).splitlines()[0],)
    if found := re.search(r"temporaries \(([\d.]+)([KMG]?)\) exceeds", notes[0]):
      parts["temporaries"] = int(float(found[1]) * _SIZES[found[2]])
  table = {**parts, "total": sum(parts.values()), "limit": int(accelerator.memory)}
  return CompileReport(settings, False, table, notes=notes)


def link_seconds(collective: hlo_traffic.Collective, accelerator: Accelerator, mesh) -> float:
  """Returns the time of a collective from bandwidth alone, without latency.

  A group uses the links along the axes of the torus in which its devices differ.
  """
  devices = mesh.devices.flat
  places = np.array([getattr(devices[i], "coords", (i,)) for i in collective.group])
  axes = max(1, int((places != places[0]).any(0).sum()))
  rate = accelerator.links * min(1, axes / accelerator.axes)
  return collective.times * collective.sent / rate


def _summed(collectives: Iterable[hlo_traffic.Collective]) -> list[dict]:
  """Sums collectives by kind and size of group: number of runs, and bytes that a device sends."""
  count: Counter[tuple[str, int]] = Counter()
  sent: Counter[tuple[str, int]] = Counter()
  for c in collectives:
    key = c.kind, len(c.group)
    count[key] += c.times
    sent[key] += c.times * c.sent
  return [
    {"kind": kind, "group": group, "count": count[kind, group], "bytes": sent[kind, group]}
    for kind, group in sorted(count)
  ]


def format_report(report: CompileReport, longest: bool = False) -> str:
  """Returns a report as a table for the console, with the kernels that take the most cycles if `longest`."""
  s, m = report.settings, report.memory
  mesh = " x ".join(f"{axis} {size}" for axis, size in s["mesh"].items())
  lines = [
    f"{s['config']}, {s['job']}: {s['devices']} x {s['kind']} ({s['topology']}), mesh {mesh}",
    f"{s['per_device_batch']:g} images per device, {s['global_batch']} per call; remat {s['remat']}, "
    f"attention {s['attention']}",
    "",
    "memory of a device",
  ]
  rows = [(name, _amount(size, "B")) for name, size in m.items() if name not in ("total", "limit")]
  share = f"{_amount(m['total'], 'B')} of {_amount(m['limit'], 'B')}, {m['total'] / m['limit']:.0%}"
  lines += _columns([*rows, ("total", share)])
  if not report.fits:
    return "\n".join([*lines, "does not fit", *report.notes])
  f, t = report.flops, report.seconds
  remat, compiled = 1 - f["model"] / f["analytic"], f["compiled"] / f["analytic"]
  lines += ["", "FLOPs of a device"]
  lines += _columns(
    [
      ("analytic", _amount(f["analytic"], "FLOP") + (f", {remat:.0%} of them by remat" if remat else "")),
      ("compiled, loops multiplied out", f"{_amount(f['compiled'], 'FLOP')}, {compiled:.2f} of it"),
      ("by XLA's count, loops once", _amount(f["compiled_loops_once"] or 0, "FLOP")),
    ]
  )
  lines += ["", "collectives: kind, devices in a group, runs, bytes that a device sends"]
  lines += _columns(
    [(c["kind"], str(c["group"]), str(c["count"]), _amount(c["bytes"], "B")) for c in report.collectives] or [("none",)]
  )
  lines += ["", "time of a call if only this resource limited it"]
  lines += _columns([(name, _amount(seconds, "s")) for name, seconds in t.items()])
  total = sum(row["cycles"] for row in report.kinds)
  if report.kinds:
    lines += ["", "cycles that the compiler expects: share, runs, products' FLOPs over the peak of these cycles"]
    lines += _columns(
      [
        (row["kind"], f"{row['cycles'] / total:.1%}", str(row["runs"]), f"{row['flops'] / row['peak']:.0%}")
        for row in report.kinds
      ]
    )
  if longest and report.kernels:
    lines += ["", "the longest kernels: share, runs, source"]
    lines += _columns([(f"{k['cycles'] / total:.1%}", str(k["runs"]), k["source"]) for k in report.kernels])
  lines += [
    "",
    f"roofline: {_amount(t[report.bound], 's')}, bound by {report.bound}; MFU at most {report.mfu_roofline:.1%}",
    f"estimate: {_amount(report.step_seconds, 's')}, MFU {report.mfu:.1%}, "
    f"{timing.digits(report.images_per_second)} images/s on all devices",
  ]
  return "\n".join(lines + [f"note: {note}" for note in report.notes])


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows)]
  return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _amount(value: float, unit: str) -> str:
  """Formats a number with three digits: 1.23 GB, 45.6 ms."""
  if not value:
    return f"0 {unit}"
  if unit == "s":
    return f"{timing.digits(value)} s" if value >= 1 else f"{timing.digits(1e3 * value)} ms"
  for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= scale:
      return f"{timing.digits(value / scale)} {prefix}{unit}"
  return f"{timing.digits(value)} {unit}"


_TABLE = (
  "config",
  "job",
  "devices",
  "mesh",
  "images/device",
  "remat",
  "memory",
  "FLOPs",
  "bound",
  "roofline MFU",
  "estimate",
  "MFU",
  "images/s",
)


def markdown(reports: Iterable[dict]) -> str:
  """Returns a Markdown table of reports as to_json gives them."""
  rows = []
  for r in reports:
    s, m = r["settings"], r["memory"]
    cells = [
      s["config"],
      s["job"],
      s["topology"],
      " x ".join(str(size) for size in s["mesh"].values()),
      f"{s['per_device_batch']:g}",
      s["remat"],
      f"{m['total'] / 1e9:.3g} of {m['limit'] / 1e9:.3g} GB ({m['total'] / m['limit']:.0%})",
    ]
    if r["fits"]:
      cells += [
        _amount(r["flops"]["analytic"], "FLOP"),
        r["bound"],
        f"{r['mfu_roofline']:.0%}",
        _amount(r["step_seconds"], "s"),
        f"{r['mfu']:.0%}",
        timing.digits(r["images_per_second"]),
      ]
    else:
      cells += ["", "does not fit", "", "", "", ""]
    rows.append(cells)
  return markdown_table(_TABLE, rows)


def markdown_kinds(reports: Iterable[dict]) -> str:
  """Returns a Markdown table of the shares of the kinds of kernels, with a column for each report that has them."""
  reports = [r for r in reports if r.get("kinds")]
  head = [
    "share of the cycles",
    *(f"{r['settings']['config']}, {r['settings']['job']}, {r['settings']['topology']}" for r in reports),
  ]
  rows = []
  for kind in profile.KINDS:
    cells = []
    for r in reports:
      total = sum(row["cycles"] for row in r["kinds"])
      found = [row for row in r["kinds"] if row["kind"] == kind]
      share = f"{found[0]['cycles'] / total:.1%}" if found else ""
      cells.append(f"{share} ({found[0]['flops'] / found[0]['peak']:.0%})" if found and found[0]["flops"] else share)
    if any(cells):
      rows.append([kind, *cells])
  return markdown_table(head, rows, numbers=True)
