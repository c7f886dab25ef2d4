"""Does a larger picture need more tokens, or a more complex one? Tokens for a fixed quality, by size and by content.

python -m experiments.size_and_content --checkpoint=FILE --quality=0.05 --out=DIR [--glyphs=DIR]
    [--sizes=32,48,64,96] [--at=32] [--num_images=240] [--posemb_scaling=scaled]

The pictures are validation scenes of the `synthetic` source, in the style of the checkpoint's config, equally many with
each number of objects from 1 to 6. With --glyphs, a folder of experiments/glyphs/prepare.py, they are held-out emoji on
white, in six classes of equal size from few to many edges (experiments/glyphs/agreement.py). Each picture is drawn
once, at the largest size, and reduced to the others. It takes the fewest tokens whose reconstruction is within
--quality, a mean squared error over pixels in [-1, 1]: at the picture's own size, or, with --at, between both reduced
to that many pixels per side, so that the detail of larger pictures does not count. A picture that is not within it with
all tokens counts with all of them; the row "within" is the share of the others, so choose a quality that nearly all
reach.

It prints the mean number of tokens by content and size, and writes lengths.json and lengths.png. As the design is
balanced, the shares of the variance of the numbers that sizes and content account for can be compared. The models for
which it was written are shapes:mixed and glyphs:mixed.
"""

import functools
import json
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments.glyphs import agreement
from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.data import transforms
from flextok_jax.data.sources import emoji, synthetic
from flextok_jax.evals import charts
from flextok_jax.evals.metrics.samples import mean_with_interval
from flextok_jax.evals.studies.halting import rank_correlation
from flextok_jax.inference import adaptive
from flextok_jax.inference.tokenizer import FlexTok, load_tokenizer
from flextok_jax.ops import distances, guidance

LEVELS = tuple(range(1, synthetic.MAX_OBJECTS + 1))  # of content: objects, or sixths of the emoji by their edges


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  string("checkpoint", None, "A tokenizer: file, folder, workdir or hub repository.")
  string("out", None, "Folder for lengths.json and lengths.png.")
  flags.DEFINE_float("quality", None, "Largest mean squared error of a good enough reconstruction.", flag_values=values)
  flags.DEFINE_list("sizes", ["32", "48", "64", "96"], "Pixels per side of the pictures.", flag_values=values)
  integer("at", 0, "Pixels per side at which pictures are compared; 0: their own.", 0)
  integer("num_images", 240, "Pictures; rounded up to a multiple of 6.", 1)
  string("glyphs", None, "Folder of emoji in several styles, in place of scenes.")
  integer("batch_size", 40, "Pictures per batch.", 1)
  integer("decoder_steps", None, "Euler steps; default: from the checkpoint.", 1)
  flags.DEFINE_enum("decoder_guidance", None, guidance.MODES, "Default: from the checkpoint.", flag_values=values)
  cli.define_posemb_flag(values)


def draw_scenes(count: int, size: int, style: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns `count` validation scenes uint8 [n, size, size, 3] of each number of objects, and these numbers [n]."""
  source, found = synthetic.Synthetic("validation", size, style), {number: [] for number in LEVELS}
  index = 0
  while min(map(len, found.values())) < count:
    record = source[index]
    found[record["num_objects"]].append(record["image"])
    index += 1
  return np.concatenate([found[number][:count] for number in LEVELS]), np.repeat(LEVELS, count)


def draw_glyphs(count: int, size: int, folder: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns `count` centred held-out emoji of each level of edges, as draw_scenes does, from few edges to many."""
  source = emoji.Emoji("validation", folder)
  drawn = agreement.draw(source, 0, count * len(LEVELS), size)
  order = np.argsort([agreement.facts(glyph)["edges"] for glyph in drawn.glyphs], kind="stable")
  return drawn.images[order], np.repeat(LEVELS, count)


def distance_at(side: int) -> distances.Distance:
  """Returns the mean squared error of pictures that are reduced to side x side pixels; 0: as they are."""
  if not side:
    return distances.mse

  def distance(a: jax.Array, b: jax.Array) -> jax.Array:
    reduce = lambda x: jax.image.resize(x, (x.shape[0], side, side, x.shape[3]), "linear")  # antialiased
    return distances.mse(reduce(a), reduce(b))

  return distance


def measure(
  model: FlexTok, images: np.ndarray, quality: float, distance: distances.Distance, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the tokens [n] that images uint8 [n, h, w, 3] take, and whether they are then within the quality [n]."""
  tokens: Any = model.tokenize(images, quality=quality, metric=distance, batch_size=batch_size, progress=None)
  lengths = np.array([len(ids) for ids in tokens])
  start = adaptive.shared_noise(0, model.latent_shape_of(images.shape[1:3]))  # from which lengths are chosen
  noise = jnp.broadcast_to(start, (len(images), *start.shape))
  restored = jnp.clip(model.detokenize(tokens, noise=noise, batch_size=batch_size), -1, 1)
  gaps = np.asarray(distance(jnp.asarray(images, jnp.float32) / 127.5 - 1, restored))
  return lengths, gaps <= quality * (1 + 1e-4)  # programs of other shapes round differently


def explained(lengths: np.ndarray, groups: np.ndarray) -> float:
  """Returns the share of the variance of lengths that the means of groups account for; 0 if lengths are all equal."""
  means = sum(
    ((lengths[groups == group].mean() - lengths.mean()) ** 2) * (groups == group).sum() for group in set(groups)
  )
  total = ((lengths - lengths.mean()) ** 2).sum()
  return float(means / total) if total else 0.0


def main(values: flags.FlagValues):
  """Measures what the flags ask for."""
  cli.require(values, "checkpoint", "quality", "out")
  sizes = cli.numbers("sizes", values.sizes, int)
  out = cli.out_folder(values)
  with cli.renamed(**cli.DECODER_FLAGS):
    model = load_tokenizer(
      values.checkpoint,
      num_steps=values.decoder_steps,
      guidance=values.decoder_guidance,
      posemb_scaling=values.posemb_scaling,
    )
  for size in sizes:
    model.latent_shape_of((size, size))  # checks it
  count, content = -(-values.num_images // len(LEVELS)), "edges" if values.glyphs else "objects"
  if values.glyphs:
    pictures, levels = draw_glyphs(count, max(sizes), values.glyphs)
  else:
    pictures, levels = draw_scenes(count, max(sizes), model.config.data.sources.synthetic.style)

  # Lengths of all pictures at all sizes.
  lengths, within = {}, {}
  for size in sizes:
    images = np.stack([transforms.center_crop(picture, size) for picture in pictures])
    distance = distance_at(values.at)
    lengths[size], within[size] = measure(model, images, values.quality, distance, values.batch_size)
  both = np.concatenate([lengths[size] for size in sizes])
  columns, rows = np.repeat(sizes, len(levels)), np.tile(levels, len(sizes))
  correlations = {"size": rank_correlation(columns, both)[0], content: rank_correlation(rows, both)[0]}
  shares = {"size": explained(both, columns), content: explained(both, rows)}

  # Report.
  cells = {size: {n: mean_with_interval(lengths[size][levels == n]) for n in LEVELS} for size in sizes}
  print(f"{content:>8} " + " ".join(f"{size:>7} px" for size in sizes))
  for n in LEVELS:
    print(f"{n:>8} " + " ".join(f"{cells[size][n][0]:10.2f}" for size in sizes))
  print(f"{'all':>8} " + " ".join(f"{lengths[size].mean():10.2f}" for size in sizes))
  print(f"{'within':>8} " + " ".join(f"{within[size].mean():10.2f}" for size in sizes))
  for name in shares:
    rho = "-" if correlations[name] is None else f"{correlations[name]:.3f}"
    print(f"{name}: {shares[name]:.1%} of the variance of the number of tokens, rank correlation {rho}")
  report = {
    "checkpoint": values.checkpoint,
    "quality": values.quality,
    "at": values.at,
    "pictures": len(levels),
    "mean_tokens": {str(size): {str(n): value for n, value in row.items()} for size, row in cells.items()},
    "within": {str(size): float(found.mean()) for size, found in within.items()},
    "share_of_variance": shares,
    "rank_correlation": correlations,
  }
  files.write_file(out / "lengths.json", (json.dumps(report, indent=1) + "\n").encode())
  title = f"tokens, error <= {values.quality:g}" + (f" at {values.at} px" if values.at else "")
  name_of = lambda n: f"sixth {n} by edges" if values.glyphs else f"{n} object{'s' * (n > 1)}"
  by_size = {name_of(n): charts.Line(sizes, [cells[size][n] for size in sizes]) for n in LEVELS}
  by_content = {f"{size} px": charts.Line(LEVELS, list(cells[size].values())) for size in sizes}
  x_label = "sixth of the emoji by edges, few to many" if values.glyphs else "objects in the scene"
  panels = {"pixels per side": {title: by_size}, x_label: {title: by_content}}
  files.write_file(out / "lengths.png", charts.curves({}, "", (), panels))
  print(f"wrote {out}")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
