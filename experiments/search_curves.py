"""What does search buy? Share of pictures that show all that a caption asks for, by number of decoded candidates.

python -m experiments.search_curves --generator=FILE --tokenizer=FILE [--num_images=128] --out=DIR
python -m experiments.search_curves --generator=OF_THE_GRID --tokenizer=GRID --decoder_steps=4 --beside=DIR --out=DIR2

Captions are those of held-out plain scenes. The verifier is `scenes`; the judge is the network of
experiments/agreement.py, trained on other scenes from another seed. A picture is right if shape and colour of the
largest object, the background and the number of objects are all as asked. Writes search_curves.json and .png; what is
in the json with the same settings is not computed again. --beside draws the curves of another folder too, dashed.
"""

import json
from pathlib import Path
import re
import time

from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np

from experiments import agreement
import flextok_jax
from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.evals import charts, grids
from flextok_jax.inference import tokenizer as tokenizer_lib
from flextok_jax.inference.scenes import HEADS
from flextok_jax.inference.tokenizer import FlexTok

SETTINGS = ("generator", "tokenizer", "decoder_steps", "num_images", "seed")
SCHEDULE = (1, 2, 4, 8, 16)
WIDTHS = ((2, 2), (2, 4), (3, 7))  # (beam width, candidates)
RUNS = {
  **{f"best of N, {n}": dict(algorithm="best_of_n", candidates=n) for n in (1, 4, 18, 36, 68, 91)},
  **{f"beam, {w} x {c}": dict(beam_width=w, candidates=c, schedule=SCHEDULE) for w, c in WIDTHS},
  **{
    f"beam from 4 tokens, {w} x {c}": dict(beam_width=w, candidates=c, schedule=SCHEDULE[2:])
    for w, c in ((2, 4), (3, 8), (4, 10))
  },
  **{
    f"lookahead, {w} x {c}": dict(algorithm="lookahead", lookahead=-1, beam_width=w, candidates=c, schedule=SCHEDULE)
    for w, c in WIDTHS[1:]
  },
  **{
    f"branching last, {w} x {c}": dict(branching="last", beam_width=w, candidates=c, schedule=SCHEDULE)
    for w, c in WIDTHS[1:]
  },
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("generator", None, "By caption: anything that load_ar takes.", flag_values=values)
  flags.DEFINE_string("tokenizer", None, "Of its tokens.", flag_values=values)
  flags.DEFINE_integer("num_images", 128, "Captions.", flag_values=values)
  flags.DEFINE_integer("decoder_steps", 0, "Unguided Euler steps; 0: the tokenizer's sampler.", flag_values=values)
  flags.DEFINE_string("only", "", "Runs whose names this regular expression matches.", flag_values=values)
  flags.DEFINE_string("beside", None, "Folder of another call, drawn dashed.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Of the samples.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the results.", flag_values=values)


def load_tokenizer(values: flags.FlagValues) -> FlexTok:
  """Returns the tokenizer of the flags, with the sampler that --decoder_steps asks for."""
  if not values.decoder_steps:
    return flextok_jax.load(values.tokenizer)
  return tokenizer_lib.load_tokenizer(values.tokenizer, num_steps=values.decoder_steps, guidance="none")


def judge(folder: Path, size: int):
  """Returns the judge's function from images to answers; its parameters are kept in the folder."""
  path = folder / "judge.npz"
  if not path.exists():
    params = jax.device_get(agreement.learn(agreement.draw_scenes(size), size, 1000, 0))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(path, **flatten_dict(params, sep="/"))
  with np.load(path) as stored:
    return agreement.make_answer(unflatten_dict(dict(stored), sep="/"))


def main(values: flags.FlagValues):
  """Runs what is missing, and writes the results."""
  cli.require(values, "generator", "tokenizer", "out")
  folder = Path(values.out)
  gen, tokenizer = flextok_jax.load_ar(values.generator), load_tokenizer(values)
  images, said, captions = agreement.scenes("validation", 0, values.num_images, tokenizer.image_size)
  answer = judge(folder, tokenizer.image_size)
  to_uint8 = lambda x: np.asarray(images_lib.as_uint8(x))
  right = lambda pictures: {name: (answer(pictures)[name] == said[name]) for name, _ in HEADS}
  path = folder / "search_curves.json"
  settings = {name: values[name].value for name in SETTINGS}
  report = json.loads(path.read_text()) if path.exists() else {}
  if report.get("settings") != settings:
    report = {"settings": settings, "runs": {}}
  pictures = {"held-out": images[:8]}
  report["runs"]["held-out scenes"] = {"decoded": 0} | shares(right(images))
  for name, run in RUNS.items():
    if name in report["runs"] or not re.match(values.only, name):
      continue
    start = time.monotonic()
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(values.seed), np.arange(len(captions)))
    found = gen.search(keys, tokenizer, "scenes", prompts=captions, **run)
    shown = to_uint8(found.images[:, 0])
    pictures[name] = shown[:8]
    report["runs"][name] = {"decoded": found.decoded, "seconds": time.monotonic() - start} | shares(right(shown))
    print(name, json.dumps(report["runs"][name]), flush=True)
    files.write_file(path, (json.dumps(report, indent=1) + "\n").encode())
  beside = [json.loads((Path(values.beside) / path.name).read_text())] if values.beside else []
  draw(folder, [report, *beside])
  labels = captions[:8]
  if len(pictures) > 1:
    chosen = [name for name in pictures if name in ("held-out", "best of N, 1", "best of N, 91", "beam, 3 x 7")]
    columns = [labels, *(pictures[name] for name in chosen)]
    files.write_file(folder / "search_pictures.png", grids.to_png(grids.grid(columns, ["", *chosen])))


def shares(right: dict) -> dict[str, float]:
  """Returns the share of pictures with each answer right, and with all."""
  each = {name: float(found.mean()) for name, found in right.items()}
  return each | {"all": float(np.all(list(right.values()), axis=0).mean())}


def draw(folder: Path, reports: list[dict]):
  """Writes the curves of one report, or of two: then of the kinds that both have, those of the second dashed."""
  lines = {}
  kinds = dict.fromkeys(name.split(",")[0] for name in RUNS if all(name in report["runs"] for report in reports))
  for i, kind in enumerate(kinds):
    for number, report in enumerate(reports):
      of_kind = (row for name, row in report["runs"].items() if name in RUNS and name.startswith(f"{kind},"))
      if points := sorted((row["decoded"], 100 * row["all"]) for row in of_kind):
        label = f"{kind}: {Path(report['settings']['tokenizer']).stem}" if len(reports) > 1 else kind
        lines[label] = charts.Line(*zip(*points), color=i, dashed=number > 0)
  ticks = [2**i for i in range(8)]
  picture = charts.curves({"pictures with all as asked, %": lines}, "decoded candidates per picture", ticks)
  files.write_file(folder / "search_curves.png", picture)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
