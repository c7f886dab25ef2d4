"""Measures how fast crops are read from files of photographs, compared with a loop over Pillow's calls.

python -m flextok_jax.benchmark_loader --config=loader [--images=512] [--parallel=2] [--out=FILE.jsonl]

Writes JPEG files, crops of the photographs that scikit-image and scikit-learn ship, into a temporary folder and reads
them in three ways (flextok_jax/tools/loader.py): a plain loop, --parallel threads and --parallel worker processes. Then
the model of the config is trained on the images read by threads, and the share of the time in which it waits for its
next batch is measured. Prints a table; --out receives a JSON line for each way and one for training.
"""

import json
from pathlib import Path
import tempfile

from absl import flags

from flextok_jax import cli
from flextok_jax.core import accelerators, files
from flextok_jax.tools import loader

_FLAGS = {
  "images": (512, "Files; each way reads all of them in a round."),
  "width": (500, "Of a file, pixels."),
  "height": (375, "Of a file, pixels."),
  "parallel": (2, "Threads, and worker processes."),
  "rounds": (3, "Timed rounds."),
  "steps": (20, "Of training."),
}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags."""
  cli.define_config_flag("Size, crops and batch of the images, and the model that trains.", values)
  for name, (default, text) in _FLAGS.items():
    flags.DEFINE_integer(name, default, text, 1, 100_000, flag_values=values)
  flags.DEFINE_string("out", None, "File for the JSON lines; overwritten.", flag_values=values)


def main(values: flags.FlagValues) -> None:
  """Measures with the settings of the flags."""
  if values.config is None:
    raise ValueError("nothing to measure: give --config=loader")
  out = cli.out_file(values)
  accelerators.start()  # training, after all rounds, needs them
  with tempfile.TemporaryDirectory() as folder:
    paths = loader.write_photographs(Path(folder), values.images, (values.width, values.height))
    config = values.config.copy_and_resolve_references()
    for source in config.data.sources.values():
      source.weight = 0.0
    config.data.sources.folder.update(weight=1.0, path=f"{folder}/train", val_path=f"{folder}/validation")
    size = sum(path.stat().st_size for path in paths) / len(paths)
    print(
      f"{len(paths)} JPEG files of {values.width} x {values.height} px, {size / 1e3:.0f} kB each, to crops of "
      f"{config.image_size} px",
      flush=True,
    )
    rows = loader.measure(config, paths, values.parallel, values.rounds)
    training = loader.train(config, values.parallel, values.steps)
  print(loader.format_report(rows, training))
  if out:
    lines = [{"kind": "way", **row} for row in rows] + [{"kind": "training", **training}]
    files.write_file(out, "".join(json.dumps(line) + "\n" for line in lines).encode())


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
