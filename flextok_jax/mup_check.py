"""Checks on a config that learning rates transfer between widths with muP: sizes of activations at several widths.

python -m flextok_jax.mup_check --config=NAME --widths=64,128,256 --steps=5 --out=DIR

Prints the slopes of log(change) over log(width) after the last step; --out receives coordinates.json and
coordinates.png. See flextok_jax/tools/mup_check.py.
"""

from collections.abc import Iterable
import json

from absl import flags

from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.tools import mup_check


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags."""
  cli.define_config_flag("The model and its training.", values)
  flags.DEFINE_list("widths", ["64", "128", "256"], "Widths, multiples of head_dim.", flag_values=values)
  flags.DEFINE_integer("steps", 5, "Updates at each width.", 1, flag_values=values)
  flags.DEFINE_string("out", None, "Folder of coordinates.json and coordinates.png.", flag_values=values)


def main(values: flags.FlagValues) -> None:
  """Runs the check with the settings of the flags."""
  if values.config is None or values.out is None:
    raise ValueError("give --config=NAME and --out=DIR")
  out = cli.out_folder(values)
  report = mup_check.check(values.config, _widths(values.widths), values.steps)
  files.write_file(out / "coordinates.json", (json.dumps(report, indent=1) + "\n").encode())
  files.write_file(out / "coordinates.png", mup_check.picture(report))
  print(mup_check.table(report["slopes"]) + f"\n{out / 'coordinates.png'}")


def _widths(items: Iterable[str]) -> list[int]:
  if not all(item.isdecimal() and int(item) for item in items) or len(set(items)) < 2:
    raise ValueError(f"--widths={','.join(items)} must be two or more widths, like 64,128,256")
  return sorted({int(item) for item in items})


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
