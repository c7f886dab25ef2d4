"""Runs that differ in a few fields: those that a config's sweep lists, and one table that compares what came of them.

python -m flextok_jax.sweep --config=NAME --list [--only=a,b] [--config.a.b=v]
python -m flextok_jax.sweep --dir=DIR [--only=a,b] [--metrics=psnr] [--out=DIR]

A config file lists its sweep beside get_config: get_sweep(), with the argument of get_config if that has one, returns
{name of a run: {dotted field: value}}. --list prints a line for each run, its name and the flags of flextok_jax.train
that make it, quoted for a shell; bash launch/sweep.sh CONFIG DIR trains each in DIR/NAME.

--dir compares the runs whose workdirs lie in DIR, finished or not: the fields in which their configs differ, steps,
last loss, images/s, and what the newest report of each (DIR/NAME/eval/.../report.json) says. Writes table.md,
table.json and table.png.
"""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import re
import shlex
import statistics
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from flextok_jax import cli
from flextok_jax.config import call, read_config
from flextok_jax.core import files
from flextok_jax.evals import figures, report
from flextok_jax.evals.metrics import measures

_POINTS = 40  # of a curve over steps at most


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  cli.define_config_flag("Experiment with a get_sweep().", values)
  flags.DEFINE_bool("list", False, "Print the runs of --config's sweep.", flag_values=values)
  flags.DEFINE_list("only", [], "Names of runs, in this order; default: all.", flag_values=values)
  flags.DEFINE_string("dir", None, "Folder of the runs' workdirs, to be compared.", flag_values=values)
  flags.DEFINE_list("metrics", [], "Of the reports, in tables and picture; default: all.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder of the table; default: --dir.", flag_values=values)


def main(values: flags.FlagValues):
  """Does what the flags ask for."""
  if values.list:
    if values.config is None:
      raise ValueError("--list is missing --config=NAME")
    sweep = read_sweep(cli.config_spec(values))
    given = config_flags.get_override_values(values["config"])
    lines = {name: flags_of(name, fields, values.config, given) for name, fields in sweep.items()}
    for name in _chosen(lines, values.only, "the sweep"):
      print(shlex.join([name, *lines[name]]))
    return
  if not values.dir:
    raise ValueError("give --dir=DIR, or --config=NAME --list")
  runs = read_runs(Path(values.dir), values.only)
  found = scored(runs)
  there = list(dict.fromkeys(metric for _, metric in found))
  for metric in values.metrics:
    if metric not in there:
      raise ValueError(f"--metrics={metric}: the reports in {values.dir} have {', '.join(there) or 'none'}")
  found = {key: by_run for key, by_run in found.items() if key[1] in (values.metrics or there)}
  for path in write(runs, found, Path(values.out or values.dir)):
    print(path)


def _chosen(there: Mapping[str, Any], only: Sequence[str], where: str) -> list[str]:
  for name in only:
    if name not in there:
      raise ValueError(f"--only={name}: there is no such run in {where}, which has {', '.join(there)}")
  return list(only or there)


# What a sweep lists.


def read_sweep(config: str) -> dict[str, dict[str, Any]]:
  """Returns {name of a run: {dotted field: value}} of a config: NAME, NAME:ARGUMENT, PATH.py or PATH.py:ARGUMENT.

  Raises:
    ValueError: no sweep there, one that fails, no runs in it, or names that cannot name a folder each.
  """
  sweep = call(config, "get_sweep")
  if not isinstance(sweep, Mapping) or not sweep or not all(isinstance(v, Mapping) for v in sweep.values()):
    raise ValueError(
      f"get_sweep() of {config} must return {{name of a run: {{dotted field: value}}}}, got {sweep!r:.80}"
    )
  labels = {}
  for name in sweep:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][-\w.+=]*", name, re.ASCII):
      raise ValueError(f"{name!r} in the sweep of {config} cannot name a folder: letters, digits and _ - . + = alone")
    label = re.sub("[^a-z0-9]+", "-", name.lower())  # as of jobs and TPUs: launch/sweep.sh
    if label in labels:
      raise ValueError(
        f"{labels[label]!r} and {name!r} in the sweep of {config} are one name to some file systems, and to clusters"
      )
    labels[label] = name
  return {name: dict(fields) for name, fields in sweep.items()}


def flags_of(name: str, fields: Mapping[str, Any], config: ConfigDict, given: Mapping[str, Any]) -> list[str]:
  """Returns the flags of flextok_jax.train that set the fields of run `name`.

  Args:
    config: that the fields are of.
    given: fields that are set for all runs.

  Raises:
    ValueError: naming the run and the field: unknown, given already, or with a value that is of another type or that no
      flag can hold.
  """
  where = lambda field: f"run {name!r} of the sweep sets {field}"
  for field, value in fields.items():
    if field in given:
      raise ValueError(f"{where(field)}: --config.{field}={given[field]} cannot be given for all")
    try:
      _copy(config).update_from_flattened_dict({field: value})
    except (KeyError, TypeError, ValueError) as e:
      raise ValueError(f"{where(field)}: {str(e.args[0]).split('. Other fields')[0]}") from None
  words = {field: f"--config.{field}={_text(value)}" for field, value in fields.items()}
  for field, word in words.items():  # as train will read it
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


# What came of the runs.


def read_runs(folder: Path, only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
  """Returns by name what the runs in a folder have come to.

  A run is {"config": {dotted field: value}, "metrics": the last ones of training, "losses": {step: loss}, "rate":
  median images/s, "report": path from the run's workdir on or None, "scores": of that report}.

  Raises:
    ValueError: no runs there, or none of a name in `only`; a report that is none.
  """
  found = sorted((path.parent for path in folder.glob("*/config.json")), key=_natural) if folder.is_dir() else []
  if not found:
    raise ValueError(f"no runs in {folder}: it has no folder with a config.json")
  found = {path.name: path for path in found}
  return {name: _read_run(found[name]) for name in _chosen(found, only, str(folder))}


def _natural(path: Path) -> list:
  """Orders names by the numbers in them: r8 before r16."""
  return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _read_run(workdir: Path) -> dict[str, Any]:
  logged = {}
  if (workdir / "metrics.jsonl").exists():
    for line in (workdir / "metrics.jsonl").read_text(errors="replace").splitlines():
      try:
        found = json.loads(line)
      except ValueError:  # cut off where the run was killed
        continue
      if "loss" in found:  # not of an evaluation
        logged[found["step"]] = found  # a run that was killed repeats steps
  reports = [*workdir.glob("eval/report.json"), *workdir.glob("eval/*/report.json")]
  newest = max(reports, key=lambda path: (path.stat().st_mtime_ns, path), default=None)
  try:
    scores = json.loads(newest.read_bytes()) if newest else {}
  except ValueError as e:
    raise ValueError(f"{newest} is no report: {e}") from None
  return {
    "config": flatten_dict(read_config(str(workdir)).to_dict(), sep="."),
    "metrics": logged[max(logged)] if logged else {},
    "losses": {step: logged[step]["loss"] for step in sorted(logged)},
    "rate": statistics.median(x["images_per_second"] for x in logged.values()) if logged else None,
    "report": str(newest.relative_to(workdir)) if newest else None,
    "scores": scores,
  }


def differing(runs: Mapping[str, Mapping]) -> list[str]:
  """Returns the fields in which the configs of runs differ; None stands for a field that a run has not."""
  configs = [run["config"] for run in runs.values()]
  names = sorted(set().union(*configs))
  return [name for name in names if any(c.get(name) != configs[0].get(name) for c in configs)]


def summary(runs: Mapping[str, Mapping]) -> report.Table:
  """Returns a row a run: fields that differ, steps, loss since the log line before, images/s, which report there is."""
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


def _without_empty(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> report.Table:
  kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
  return report.Table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def scored(runs: Mapping[str, Mapping]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
  """Returns {(set, metric): {run: {token count (or "vae"): value}}} of the runs' reports."""
  found = {}
  for run, fields in runs.items():
    for name, scores in fields["scores"].get("sets", {}).items():
      for column, row in scores["by_tokens"].items():
        for metric, value in row.items():
          found.setdefault((name, metric), {}).setdefault(run, {})[column] = value
  return found


def tables(runs: Mapping[str, Mapping], found: Mapping[tuple[str, str], Mapping]) -> list[report.Table]:
  """Returns the summary and a table of each of `found`, of scored(runs): runs by token counts."""
  made = [summary(runs)]
  for (name, metric), by_run in found.items():
    columns = sorted({column for row in by_run.values() for column in row}, key=lambda x: (not x.isdigit(), len(x), x))
    decimals = measures.DECIMALS.get(metric, 4)
    rows = [
      [run, *(f"{row[c]:.{decimals}f}" if c in row else None for c in columns)]
      for run, row in ((run, by_run.get(run, {})) for run in runs)
    ]
    made.append(report.Table(f"{name}: {measures.UNITS.get(metric, metric)}", ["run \\ tokens", *columns], rows))
  return made


def picture(runs: Mapping[str, Mapping], found: Mapping[tuple[str, str], Mapping]) -> bytes | None:
  """Returns a PNG, a line a run: `found` over token counts (log axis), loss over steps; None without either."""
  panels, ticks = {}, set()
  for (name, metric), by_run in found.items():
    for i, run in enumerate(runs):
      points = {int(k): v for k, v in by_run.get(run, {}).items() if k.isdigit()}
      if points:
        ticks |= points.keys()
        title = f"{name}: {measures.UNITS.get(metric, metric)}"
        panels.setdefault(title, {})[run] = figures.Line(list(points), list(points.values()), color=i)
  losses = {run: _thinned(fields["losses"], i) for i, (run, fields) in enumerate(runs.items()) if fields["losses"]}
  others = {"step": {"loss": losses}} if losses else {}
  return figures.curves(panels, "tokens", sorted(ticks), others) if panels or others else None


def _thinned(losses: Mapping[int, float], color: int) -> figures.Line:
  """A curve of means over as many log lines as leave few points, each at its last step."""
  size = -(-len(losses) // _POINTS)
  steps, values = list(losses), list(losses.values())
  parts = range(0, len(losses), size)
  means = [statistics.fmean(values[i : i + size]) for i in parts]
  return figures.Line([steps[min(i + size, len(steps)) - 1] for i in parts], means, color=color)


def write(runs: Mapping[str, Mapping], found: Mapping[tuple[str, str], Mapping], out: Path) -> list[Path]:
  """Writes table.md and (where there is something to draw) table.png of `found`, table.json of all; returns paths."""
  drawn, fields = picture(runs, found), differing(runs)
  blocks = []
  for table in tables(runs, found):
    blocks += [f"**{table.title}**", report.markdown_table(table.columns, table.rows)]
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
    "table.md": ("\n\n".join(blocks + ["![](table.png)"] * bool(drawn)) + "\n").encode(),
    "table.json": (json.dumps({"fields": fields, "runs": whole}, indent=1) + "\n").encode(),
  }
  if drawn:
    contents["table.png"] = drawn
  for file, content in contents.items():
    files.write_file(out / file, content)
  print("\n\n".join(blocks) + "\n")
  return [out / file for file in contents]


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
