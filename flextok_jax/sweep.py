"""Lists the runs of a config's sweep, which differ in a few fields, or compares finished runs in a table.

python -m flextok_jax.sweep --config=NAME --list [--only=a,b] [--data=FOLDER] [--config.a.b=v]
python -m flextok_jax.sweep --dir=DIR [--only=a,b] [--metrics=psnr] [--out=DIR]

A config defines its sweep beside get_config: get_sweep(), with the argument of get_config if there is one, returns
{name of a run: {dotted field: value}}. --list prints a line per run, quoted for a shell: its name and its flags of
flextok_jax.train besides those given here; bash launch/sweep.sh CONFIG DIR trains each in DIR/NAME.

--dir compares the runs with workdirs in DIR, finished or not: the fields in which their configs differ, steps, last
loss, images per second, and the scores of the newest report of each (DIR/NAME/eval/.../report.json). Writes table.md,
table.json and table.png.
"""

import shlex

from absl import flags
from ml_collections import config_flags

from flextok_jax import cli
from flextok_jax.tools import sweep


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  cli.define_config_flag("A config with get_sweep().", values)
  cli.define_data_flag(values)
  flags.DEFINE_bool("list", False, "Print the runs of --config's sweep.", flag_values=values)
  flags.DEFINE_list("only", [], "Names of runs, in this order; default: all.", flag_values=values)
  flags.DEFINE_string("dir", None, "Folder with the workdirs of the runs to compare.", flag_values=values)
  flags.DEFINE_list("metrics", [], "Metrics of the reports in tables and picture; default: all.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the table; default: --dir.", flag_values=values)


def main(values: flags.FlagValues):
  """Lists or compares runs."""
  if values.list:
    if values.config is None:
      raise ValueError("--list is missing --config=NAME")
    config = cli.with_data(values.config, values)
    runs = sweep.read_sweep(cli.config_spec(values))
    given = config_flags.get_override_values(values["config"])
    lines = {name: sweep.train_flags(name, fields, config, given) for name, fields in runs.items()}
    for name in sweep.choose(lines, values.only, "the sweep"):
      print(shlex.join([name, *lines[name]]))
    return
  if not values.dir:
    raise ValueError("give --dir=DIR, or --config=NAME --list")
  folder = cli.local_path(values.dir, "--dir")
  out = cli.new_folder(values.out or folder, "--out" if values.out else "--dir")
  results = sweep.read_runs(folder, values.only)
  found = sweep.scored(results)
  there = list(dict.fromkeys(metric for _, metric in found))
  for metric in values.metrics:
    if metric not in there:
      raise ValueError(f"--metrics={metric}: the reports in {folder} have {', '.join(there) or 'none'}")
  found = {key: by_run for key, by_run in found.items() if key[1] in (values.metrics or there)}
  for path in sweep.write(results, found, out):
    print(path)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
