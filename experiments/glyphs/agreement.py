"""Do generators of glyphs draw what they are asked for: group, style, main colour; and do they choose fitting lengths?

python -m experiments.glyphs.agreement --glyphs=DIR --tokenizer=FILE --generators=FILE,FILE [--guidance_scales=2,4]
    [--num_images=512] [--qualities=0.09,0.05] --out=DIR

DIR is the folder of experiments/glyphs/prepare.py. A picture has the group, the style and the main colour of the
nearest of all glyphs of the training split (Judge). So are judged: held-out glyphs (the accuracy of the judge),
reconstructions by the tokenizer, of these and of glyphs of the training split, and generated images: of every group
equally many, or of the captions of glyphs of the training split, and of held-out ones, whose names may have words that
no training caption has. For glyphs of the training split, "glyph" is the share of pictures whose nearest glyph is the
very one. With --qualities, reconstructions from as many tokens as tokenize --quality keeps are judged as well. The main
colour of a glyph is that of most of its opaque pixels, of COLORS. For sequences that end early, reports the rank
correlation of their length with the complexity of the real glyph: the number of its colours (of 512) that cover 1% or
more of it, and the mean difference of neighbouring pixels.
"""

from collections.abc import Iterable
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
JUDGED_SIZE = 16  # pixels: details that decoders get wrong do not count


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("glyphs", None, "Folder of glyphs in several styles.", flag_values=values)
  flags.DEFINE_list("generators", [], "Generators: anything that load_ar takes.", flag_values=values)
  flags.DEFINE_string("tokenizer", None, "The tokenizer whose tokens they draw.", flag_values=values)
  flags.DEFINE_list("guidance_scales", [], "Of the generators; default: from their configs.", flag_values=values)
  flags.DEFINE_list("qualities", [], "Largest MSE of a reconstruction that chooses its length.", flag_values=values)
  flags.DEFINE_integer("num_images", 512, "Images of each kind.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Of the glyphs asked for, the samples and the decoder's noise.", flag_values=values)
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
  """n glyphs, centred on white: images uint8 [n, s, s, 3]; answers, {question: int [n]}; the glyphs."""

  images: np.ndarray
  answers: dict[str, np.ndarray]
  glyphs: list[emoji.Glyph]


def answers_of(glyphs: list[emoji.Glyph]) -> dict[str, np.ndarray]:
  """Returns {"group", "style" or "color": numbers [n]}."""
  styles = sorted({glyph.style for glyph in glyphs})
  return {
    "group": np.array([code_points.group_of(glyph.codes) for glyph in glyphs]),
    "style": np.array([styles.index(glyph.style) for glyph in glyphs]),
    "color": np.array([facts(glyph)["color"] for glyph in glyphs]),
  }


def draw(source: emoji.Emoji, seed: int, count: int, size: int) -> Drawn:
  """Draws glyphs of a split, every base as often."""
  rng = np.random.default_rng(seed)
  bases = [source.bases[i] for i in rng.integers(len(source.bases), size=count)]
  glyphs = [base[rng.integers(len(base))] for base in bases]
  place = lambda glyph: transforms.center_crop(emoji.place(glyph.picture(), rng, centered=True), size)
  return Drawn(np.stack([place(glyph) for glyph in glyphs]), answers_of(glyphs), glyphs)


def describe_lengths(sequences: list[np.ndarray], glyphs: list[emoji.Glyph]) -> dict[str, float]:
  """Returns the mean length and its rank correlation with the complexity of each sequence's glyph."""
  lengths = [len(sequence) for sequence in sequences]
  found = {"mean length": float(np.mean(lengths))}
  for what in ("colors", "edges"):
    complexity = [facts(glyph)[what] for glyph in glyphs]
    found[f"rank correlation with {what}"] = float(scipy.stats.spearmanr(lengths, complexity)[0])
  return found


class Judge:
  """Answers for pictures of centred glyphs with what the nearest of given glyphs is.

  Distances are of squared pixels. Glyphs are put on the picture's own background, the median of its border.

  Args:
    glyphs: to compare with.
  """

  def __init__(self, glyphs: list[emoji.Glyph]):
    self._answers = answers_of(glyphs) | {"glyph": np.arange(len(glyphs))}
    pictures = [glyph.picture() for glyph in glyphs]
    black = [Image.merge("RGBA", (*[Image.new("L", p.size)] * 3, p.getchannel("A"))) for p in pictures]
    rng = np.random.default_rng(0)  # centred glyphs on white need none
    place = lambda glyph: emoji.place(glyph, rng, centered=True)
    on_white, cleared = (self._shrink(map(place, glyphs)) for glyphs in (pictures, black))
    self._opaque, self._drawn = 1 - cleared, on_white - cleared  # [n, s, s, 3]: opacity, colour times opacity

  def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """images uint8 [n, s, s, 3] -> {question: int [n]}; "glyph": the number of the nearest."""
    nearest = []
    for image in self._shrink(images):
      border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
      background = np.median(border, 0)
      gaps = self._drawn - self._opaque * background - (image - background)
      nearest.append(np.einsum("nhwc,nhwc->n", gaps, gaps).argmin())
    return {question: answers[nearest] for question, answers in self._answers.items()}

  @staticmethod
  def _shrink(images: Iterable[np.ndarray]) -> np.ndarray:
    """Returns images in [0, 1], float32 [n, JUDGED_SIZE, JUDGED_SIZE, 3]."""
    return np.stack([transforms.center_crop(x, JUDGED_SIZE) for x in images]).astype(np.float32) / 255


def main(values: flags.FlagValues):
  """Measures what the flags ask for."""
  cli.require(values, "glyphs", "tokenizer", "out")
  tokenizer = flextok_jax.load(values.tokenizer)
  generators = {name: flextok_jax.load_ar(name) for name in values.generators}
  size, count, seed = tokenizer.image_size, values.num_images, values.seed
  train, held_out = (emoji.Emoji(split, values.glyphs) for split in ("train", "validation"))
  known = [glyph for base in train.bases for glyph in base]
  judge = Judge(known)
  number_of = {id(glyph): number for number, glyph in enumerate(known)}

  def right(pictures: np.ndarray, said: dict[str, np.ndarray]) -> dict[str, float]:
    found = judge(pictures)
    return {question: float((found[question] == answer).mean()) for question, answer in said.items()}

  def tokenize(images: np.ndarray, **options) -> list[np.ndarray]:
    return [row for i in range(0, count, 64) for row in tokenizer.tokenize(images[i : i + 64], **options)]

  def reconstruct(images: np.ndarray) -> np.ndarray:
    return agreement.decode(tokenizer, tokenize(images), seed)

  real, seen = (draw(source, seed + 1, count, size) for source in (held_out, train))
  seen.answers["glyph"] = np.array([number_of[id(glyph)] for glyph in seen.glyphs])
  asked = {"training captions": seen, "held-out captions": real}
  report = {
    "num_images": count,
    "held-out glyphs": right(real.images, real.answers),
    "their reconstructions": right(reconstruct(real.images), real.answers),
    "reconstructions of training glyphs": right(reconstruct(seen.images), seen.answers),
  }
  for quality in map(float, values.qualities):
    for name, drawn in {"held-out": real, "training": seen}.items():
      ids = tokenize(drawn.images, quality=quality, num_steps=1)
      found = right(agreement.decode(tokenizer, ids, seed), drawn.answers) | describe_lengths(ids, drawn.glyphs)
      report[f"reconstructions of {name} glyphs, quality {quality:g}"] = found
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
        found |= describe_lengths(sequences, drawn.glyphs)
      report[f"{title}, {which}"] = settings | found
  text = json.dumps(report, indent=1)
  print(text)
  files.write_file(Path(values.out) / "agreement.json", (text + "\n").encode())


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
