"""Sweeps: reads the runs that a config lists, turns them into flags, and compares the results of runs in a table."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import re
import statistics
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from flextok_jax.config import call, check, read_config
from flextok_jax.core import files
from flextok_jax.evals import charts
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.report import Table

_POINTS = 40  # of a curve over steps, at most


def choose(names: Mapping[str, Any], only: Sequence[str], where: str) -> list[str]:
  """Returns the names in `only`, or all names if it is empty; ValueError, saying where, if one is unknown."""
  for name in only:
    if name not in names:
      raise ValueError(f"only={name}: there is no such run in {where}, which has {', '.join(names)}")
  return list(only or names)


# The runs of a config.


def read_sweep(config: str) -> dict[str, dict[str, Any]]:
  """Returns {name of a run: {dotted field: value}} of a config: NAME, NAME:ARGUMENT, PATH.py or PATH.py:ARGUMENT.

  Raises:
    ValueError: the config has no get_sweep(), it fails or lists no runs, or a name cannot name a folder.
  """
  sweep = call(config, "get_sweep")
  if not isinstance(sweep, Mapping) or not sweep or not all(isinstance(v, Mapping) for v in sweep.values()):
    raise ValueError(
      f"get_sweep() of {config} must return {{name of a run: {{dotted field: value}}}}, got {sweep!r:.80}"
    )
  labels: dict[str, str] = {}
  for name in sweep:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][-\w.+=]*", name, re.ASCII):
      raise ValueError(
        f"{name!r} in the sweep of {config} cannot name a folder: use only letters, digits and _ - . + ="
      )
    label = re.sub("[^a-z0-9]+", "-", name.lower())  # as in the names of jobs and TPUs: launch/sweep.sh
    if label in labels:
      raise ValueError(
        f"{labels[label]!r} and {name!r} in the sweep of {config} are one name to some file systems, and to clusters"
      )
    labels[label] = name
  return {name: dict(fields) for name, fields in sweep.items()}


def train_flags(name: str, fields: Mapping[str, Any], config: ConfigDict, given: Mapping[str, Any]) -> list[str]:
  """Returns the flags of flextok_jax.train that set the fields of run `name`.

  Args:
    config: has the fields.
    given: fields that are set for all runs.

  Raises:
    ValueError: a field that is unknown or given for all runs, or a value out of range or that no flag can express; the
      message names the run and the field.
  """
  where = lambda field: f"run {name!r} of the sweep sets {field}"
  for field, value in fields.items():
    if field in given:
      raise ValueError(f"{where(field)}: --config.{field}={given[field]} cannot be given for all")
    try:
      changed = _copy(config)
      changed.update_from_flattened_dict({field: value})
      check(changed)
    except (KeyError, TypeError, ValueError) as e:
      raise ValueError(f"{where(field)}: {str(e.args[0]).split('. Other fields')[0]}") from None
  words = {field: f"--config.{field}={_text(value)}" for field, value in fields.items()}
  for field, word in words.items():  # as train would read it
    wanted, values = _copy(config), flags.FlagValues()
    wanted.update_from_flattened_dict({field: fields[field]})
    argv = ["train", word]
    try:
      found = config_flags.DEFINE_config_dict("config", _copy(config), flag_values=values, sys_argv=argv)
      values(argv)
      survived = found.value == wanted and word.isprintable()
    except (flags.Error, LookupError, TypeError, ValueError):
      survived = False
    if not survived:
      raise ValueError(f"{where(field)} to {fields[field]!r}, which no flag like {word!r} does: use plain values")
  return list(words.values())


def _copy(config: ConfigDict) -> ConfigDict:
  return config.copy_and_resolve_references().lock()


def _text(value) -> str:
  return value if isinstance(value, str) else repr(tuple(value) if isinstance(value, list) else value)


# Results of runs.


def read_runs(folder: Path, only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
  """Returns the results of the runs in a folder by name.

  A result is {"config": {dotted field: value}, "metrics": the last ones of training, "losses": {step: loss}, "rate":
  median images per second, "report": path relative to the run's workdir or None, "scores": of that report}.

  Raises:
    ValueError: no runs, an unknown name in `only`, or a damaged report.
  """
  found = sorted((path.parent for path in folder.glob("*/config.json")), key=_natural) if folder.is_dir() else []
  if not found:
    raise ValueError(f"no runs in {folder}: it has no folder with a config.json")
  by_name = {path.name: path for path in found}
  return {name: _read_run(by_name[name]) for name in choose(by_name, only, str(folder))}


def _natural(path: Path) -> list:
  """Returns a key that sorts names by the numbers in them: r8 before r16."""
  return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _read_run(workdir: Path) -> dict[str, Any]:
  logged = {}
  if (workdir / "metrics.jsonl").exists():
    for line in (workdir / "metrics.jsonl").read_text(errors="replace").splitlines():
      try:
        found = json.loads(line)
      except ValueError:  # truncated when the run was killed
        continue
      needed = ("step", "loss", "images_per_second")  # an evaluation's lines have no loss
      if isinstance(found, dict) and all(isinstance(found.get(name), int | float) for name in needed):
        logged[found["step"]] = found  # a resumed run repeats steps
  reports = [*workdir.glob("eval/report.json"), *workdir.glob("eval/*/report.json")]
  newest = max(reports, key=lambda path: (path.stat().st_mtime_ns, path), default=None)
  try:
    scores = json.loads(newest.read_bytes()) if newest else {}
    for (_, metric), by_run in scored({"": {"scores": scores}}).items():
      [metrics_lib.to_text(metric, value) for value in by_run[""].values()]
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
    raise ValueError(f"{newest} is not a report: {type(e).__name__}: {e}") from None
  return {
    "config": flatten_dict(read_config(str(workdir)).to_dict(), sep="."),
    "metrics": logged[max(logged)] if logged else {},
    "losses": {step: logged[step]["loss"] for step in sorted(logged)},
    "rate": statistics.median(x["images_per_second"] for x in logged.values()) if logged else None,
    "report": str(newest.relative_to(workdir)) if newest else None,
    "scores": scores,
  }


def differing(runs: Mapping[str, Mapping]) -> list[str]:
  """Returns the fields in which the configs of runs differ; a missing field counts as None."""
  configs = [run["config"] for run in runs.values()]
  names = sorted(set().union(*configs))
  return [name for name in names if any(c.get(name) != configs[0].get(name) for c in configs)]


def summary(runs: Mapping[str, Mapping]) -> Table:
  """Returns a table with a row per run: fields that differ, steps, last logged loss, images per second, report."""
  fields = differing(runs)
  rows = [
    [
      name,
      *(run["config"].get(field) for field in fields),
      run["metrics"].get("step"),
      run["metrics"].get("loss"),
      run["rate"],
      run["scores"].get("loss"),
      run["report"],
    ]
    for name, run in runs.items()
  ]
  return _without_empty("Runs", ["run", *fields, "steps", "loss", "images/s", "loss held out", "report"], rows)


def _without_empty(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> Table:
  kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
  return Table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def scored(runs: Mapping[str, Mapping]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
  """Returns {(set, metric): {run: {token count (or "vae"): value}}} of the runs' reports."""
  found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
  for run, fields in runs.items():
    for name, scores in fields["scores"].get("sets", {}).items():
      for column, row in scores["by_tokens"].items():
        for metric, value in row.items():
          found.setdefault((name, metric), {}).setdefault(run, {})[column] = value
  return found


def tables(runs: Mapping[str, Mapping], found: Mapping[tuple[str, str], Mapping]) -> list[Table]:
  """Returns the summary, and a table (runs by token counts) for each entry of `found`, which scored(runs) returns."""
  made = [summary(runs)]
  for (name, metric), by_run in found.items():
    columns = sorted({column for row in by_run.values() for column in row}, key=lambda x: (not x.isdigit(), len(x), x))
    rows = [
      [run, *(metrics_lib.to_text(metric, row[c]) if c in row else None for c in columns)]
      for run, row in ((run, by_run.get(run, {})) for run in runs)
    ]
    made.append(Table(f"{name}: {metrics_lib.title(metric)}", ["run \\ tokens", *columns], rows))
  return made


def draw(runs: Mapping[str, Mapping], found: Mapping[tuple[str, str], Mapping]) -> bytes | None:
  """Draws `found` over token counts (log axis) and the loss over steps, a line per run; None if there is neither."""
  panels: dict[str, dict[str, charts.Line]] = {}
  ticks: set[int] = set()
  for (name, metric), by_run in found.items():
    for i, run in enumerate(runs):
      points = {int(k): v for k, v in by_run.get(run, {}).items() if k.isdigit()}
      if points:
        ticks |= points.keys()
        title = f"{name}: {metrics_lib.title(metric)}"
        panels.setdefault(title, {})[run] = charts.Line(list(points), list(points.values()), color=i)
  losses = {run: _loss_curve(fields["losses"], i) for i, (run, fields) in enumerate(runs.items()) if fields["losses"]}
  linear = {"step": {"loss": losses}} if losses else {}
  return charts.curves(panels, "tokens", sorted(ticks), linear) if panels or linear else None


def _loss_curve(losses: Mapping[int, float], color: int) -> charts.Line:
  """Returns a curve of at most _POINTS means over consecutive log lines, each at its last step."""
  size = -(-len(losses) // _POINTS)
  steps, values = list(losses), list(losses.values())
  parts = range(0, len(losses), size)
  means = [statistics.fmean(values[i : i + size]) for i in parts]
  return charts.Line([steps[min(i + size, len(steps)) - 1] for i in parts], means, color=color)


def write(runs: Mapping[str, Mapping], found: Mapping[tuple[str, str], Mapping], out: Path) -> list[Path]:
  """Writes table.md, table.json and, if there is something to draw, table.png; prints the tables; returns the paths."""
  picture, fields = draw(runs, found), differing(runs)
  blocks = [table.to_markdown() for table in tables(runs, found)]
  whole = {
    name: {
      "fields": {field: run["config"].get(field) for field in fields},
      "metrics": run["metrics"],
      "images_per_second": run["rate"],
      "report": run["report"],
      "scores": run["scores"],
    }
    for name, run in runs.items()
  }
  contents = {
    "table.md": ("\n\n".join(blocks + ["![](table.png)"] * bool(picture)) + "\n").encode(),
    "table.json": (json.dumps({"fields": fields, "runs": whole}, indent=1) + "\n").encode(),
  }
  if picture:
    contents["table.png"] = picture
  for file, content in contents.items():
    files.write_file(out / file, content)
  print("\n\n".join(blocks) + "\n")
  return [out / file for file in contents]
