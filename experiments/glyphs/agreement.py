"""Do generators of glyphs draw what they are asked for: group, style, main colour; and do they choose fitting lengths?

python -m experiments.glyphs.agreement --glyphs=DIR --tokenizer=FILE --generators=FILE,FILE [--guidance_scales=2,4]
    [--num_images=512] --out=DIR

DIR is the folder of experiments/glyphs/prepare.py. A small convolutional network is trained on glyphs of the training
split alone, half of them centred. It then answers for held-out centred glyphs (its own accuracy), for reconstructions
of these by the tokenizer, and for generated images: of every group equally many, or of the captions of glyphs of the
training split, and of held-out ones, whose names may have words that no training caption has. The main colour of a
glyph is that of most of its opaque pixels, of COLORS. For generators that stop by themselves, reports the rank
correlation of their length with the complexity of the real glyph: the number of its colours (of 512) that cover 1% or
more of it, and the mean difference of neighbouring pixels.
"""

import colorsys
import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

from absl import flags
import numpy as np
from PIL import Image
import scipy.stats

from experiments import agreement
import flextok_jax
from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.data import transforms
from flextok_jax.data.sources import code_points, emoji

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "gray", "black")
LESSONS, BATCH = 24_000, 128  # pictures that the network is trained on, and of them in a step


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("glyphs", None, "Folder of glyphs in several styles.", flag_values=values)
  flags.DEFINE_list("generators", [], "Generators: anything that load_ar takes.", flag_values=values)
  flags.DEFINE_string("tokenizer", None, "The tokenizer whose tokens they draw.", flag_values=values)
  flags.DEFINE_list("guidance_scales", [], "Of the generators; default: from their configs.", flag_values=values)
  flags.DEFINE_integer("num_images", 512, "Images of each kind.", flag_values=values)
  flags.DEFINE_integer("steps", 1500, "Training steps of the network.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Seed of the network, the samples and the decoder's noise.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for agreement.json.", flag_values=values)


def color_of(rgb: np.ndarray) -> int:
  """Returns the number in COLORS of a colour in [0, 1]."""
  hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
  if value < 0.2:
    return COLORS.index("black")
  if saturation < 0.15:
    return COLORS.index("white" if value > 0.85 else "gray")
  degrees = 360 * hue
  if 15 <= degrees < 50 and value < 0.65:
    return COLORS.index("brown")
  if (degrees >= 345 or degrees < 15) and saturation < 0.55 and value > 0.7:
    return COLORS.index("pink")
  bounds = ((15, "red"), (42, "orange"), (70, "yellow"), (170, "green"), (255, "blue"), (295, "purple"), (345, "pink"))
  return COLORS.index(next((name for bound, name in bounds if degrees < bound), "red"))


@functools.cache
def facts(glyph: emoji.Glyph) -> dict[str, float]:
  """Returns main color, number of colors and edges of a glyph."""
  rgba = np.asarray(glyph.picture().resize((32, 32), Image.Resampling.BOX), np.float32) / 255
  opaque = rgba[rgba[..., 3] > 0.5][:, :3]
  if not len(opaque):
    return {"color": COLORS.index("black"), "colors": 0, "edges": 0.0}
  main = np.bincount([color_of(rgb) for rgb in opaque]).argmax()
  cells = np.bincount(np.minimum(8 * opaque, 7).astype(int) @ (64, 8, 1))
  white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
  edges = sum(float(np.abs(np.diff(white, axis=axis)).mean()) for axis in (0, 1))
  return {"color": int(main), "colors": int((cells >= 0.01 * len(opaque)).sum()), "edges": edges}


class Drawn(NamedTuple):
  """n glyphs: images uint8 [n, s, s, 3]; answers, {question: int [n]}; the glyphs."""

  images: np.ndarray
  answers: dict[str, np.ndarray]
  glyphs: list[emoji.Glyph]


def draw(source: emoji.Emoji, styles: list[str], seed: int, count: int, size: int, centered: float = 1.0) -> Drawn:
  """Draws glyphs of a split, every base as often, a share of them centred."""
  rng = np.random.default_rng(seed)
  bases = [source.bases[i] for i in rng.integers(len(source.bases), size=count)]
  glyphs = [base[rng.integers(len(base))] for base in bases]
  place = lambda glyph: emoji.place(glyph.picture(), rng, bool(rng.random() < centered))
  answers = {
    "group": np.array([code_points.group_of(glyph.codes) for glyph in glyphs]),
    "style": np.array([styles.index(glyph.style) for glyph in glyphs]),
    "color": np.array([facts(glyph)["color"] for glyph in glyphs]),
  }
  return Drawn(np.stack([transforms.center_crop(place(glyph), size) for glyph in glyphs]), answers, glyphs)


def main(values: flags.FlagValues):
  """Measures what the flags ask for."""
  cli.require(values, "glyphs", "tokenizer", "out")
  tokenizer = flextok_jax.load(values.tokenizer)
  generators = {name: flextok_jax.load_ar(name) for name in values.generators}
  size, count, seed = tokenizer.image_size, values.num_images, values.seed
  train, held_out = (emoji.Emoji(split, values.glyphs) for split in ("train", "validation"))
  styles = sorted({glyph.style for base in train.bases for glyph in base})
  heads = (("group", len(code_points.CLASS_NAMES)), ("style", len(styles)), ("color", len(COLORS)))
  lessons = draw(train, styles, seed, LESSONS, size, centered=0.5)

  def lesson(step: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rows = np.random.default_rng((seed, step)).integers(LESSONS, size=BATCH)
    return lessons.images[rows], {k: v[rows] for k, v in lessons.answers.items()}

  answer = agreement.make_answer(agreement.learn(lesson, size, values.steps, seed, heads), heads)
  right = lambda pictures, said: {k: float((answer(pictures)[k] == v).mean()) for k, v in said.items()}
  real = draw(held_out, styles, seed + 1, count, size)
  asked = {"training captions": draw(train, styles, seed + 1, count, size), "held-out captions": real}
  ids = [row for i in range(0, count, 64) for row in tokenizer.tokenize(real.images[i : i + 64])]
  report = {
    "num_images": count,
    "held-out glyphs": right(real.images, real.answers),
    "their reconstructions": right(agreement.decode(tokenizer, ids, seed), real.answers),
  }
  labels = np.resize(np.arange(len(code_points.CLASS_NAMES)), count)
  changes = [{"guidance_scale": float(scale)} for scale in values.guidance_scales] or [{}]
  for (name, gen), change in itertools.product(generators.items(), changes):
    title = f"{name}{''.join(f', {scale:g}' for scale in change.values())}"
    if gen.config.ar.condition == "class":
      settings, sequences = agreement.generate(gen, seed, labels, [], **change)
      report[title] = settings | right(agreement.decode(tokenizer, sequences, seed), {"group": labels})
      continue
    for which, drawn in asked.items():
      prompts = [train.caption_of(glyph) for glyph in drawn.glyphs]
      settings, sequences = agreement.generate(gen, seed, labels, prompts, **change)
      found = right(agreement.decode(tokenizer, sequences, seed), drawn.answers)
      if gen.stop_id is not None:
        lengths = [len(sequence) for sequence in sequences]
        found["mean length"] = float(np.mean(lengths))
        for what in ("colors", "edges"):
          complexity = [facts(glyph)[what] for glyph in drawn.glyphs]
          found[f"rank correlation with {what}"] = float(scipy.stats.spearmanr(lengths, complexity)[0])
      report[f"{title}, {which}"] = settings | found
  text = json.dumps(report, indent=1)
  print(text)
  files.write_file(Path(values.out) / "agreement.json", (text + "\n").encode())


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
