"""Does the adaptive length follow what is in a picture? Mean length by number of objects, and their rank correlation.

python -m tests.halting --checkpoint=FILE --quality=0.02 [--metric=mse] [--decoder_steps=1] [--num_images=256]
    [--out=halting.png]

On validation scenes of the `synthetic` source, in the style of the checkpoint's own config, where the number of objects
is known. Lengths are those that make_lengths_fn gives.
"""

import io
from pathlib import Path

from absl import flags
import numpy as np
import scipy.stats

from flextok_jax import adaptive, cli, detokenize, files
from flextok_jax.checkpoints import loading
from flextok_jax.data import pipeline
from flextok_jax.evals import distances
from flextok_jax.ops import guidance
from flextok_jax.stages import make_stage
from flextok_jax.tokenize import tokenize

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A tokenizer: file, folder or hub repository.")
QUALITY = flags.DEFINE_float("quality", None, "Largest distance of a reconstruction that is good enough.")
METRIC = flags.DEFINE_enum("metric", "mse", list(distances.DISTANCES), "The distance.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 256, "Scenes.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Scenes at once.")
DECODER_STEPS = flags.DEFINE_integer("decoder_steps", None, "Euler steps; default: the checkpoint's.", 1)
DECODER_GUIDANCE = flags.DEFINE_enum("decoder_guidance", None, guidance.MODES, "Default: the checkpoint's.")
SEED = flags.DEFINE_integer("seed", 0, "Of the noise that all scenes share.")
OUT = flags.DEFINE_string("out", None, "PNG file for mean length against number of objects; default: none.")


def measure(config, params, images: np.ndarray, quality: float, metric: str, seed: int, batch_size: int):
  """Returns (lengths int32 [n], their distances float32 [n]) of images uint8 [n, h, w, 3]."""
  prefix_fn = adaptive.make_prefix_fn(config, params, quality, metric, seed)
  ids = tokenize(make_stage(config).predict_fns["tokenize"], params, images, batch_size)
  batch_size = min(batch_size, len(images))
  lengths, gaps = [], []
  for start in range(0, len(images), batch_size):
    rows = np.minimum(np.arange(start, start + batch_size), len(images) - 1)  # the last batch is padded
    for parts, values in zip((lengths, gaps), prefix_fn(images[rows], ids[rows])):
      parts.append(np.asarray(values)[: len(images) - start])
  return np.concatenate(lengths), np.concatenate(gaps)


def by_objects(num_objects: np.ndarray, lengths: np.ndarray) -> dict[int, tuple[int, float, float]]:
  """Returns {number of objects: (scenes, mean length, standard error of the mean)}."""
  rows = {}
  for count in np.unique(num_objects).tolist():
    chosen = lengths[num_objects == count]
    error = chosen.std(ddof=1) / np.sqrt(len(chosen)) if len(chosen) > 1 else np.nan
    rows[count] = len(chosen), float(chosen.mean()), float(error)
  return rows


def halting_png(rows: dict[int, tuple[int, float, float]], title: str) -> bytes:
  """Draws mean length, with its standard error, against the number of objects; rows as of by_objects."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5, 3.8), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  panel = figure.subplots()
  _, means, errors = zip(*rows.values())
  panel.errorbar(list(rows), means, np.nan_to_num(errors), marker="o", markersize=4.5, linewidth=1.8, capsize=3)
  panel.set_xticks(list(rows))
  panel.set_xlabel("objects in the scene")
  panel.set_ylabel("tokens, mean and standard error")
  panel.set_title(title, fontsize=11)
  panel.grid(color="0.9", linewidth=0.8)
  panel.set_axisbelow(True)
  panel.spines[["top", "right"]].set_visible(False)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", metadata={"Software": None})
  return buffer.getvalue()


def main():
  if not CHECKPOINT.value or QUALITY.value is None:
    raise ValueError("give --checkpoint=FILE and --quality=DISTANCE")
  if BATCH_SIZE.value < 1:
    raise ValueError(f"--batch_size={BATCH_SIZE.value} must be at least 1")
  config, params = loading.load(CHECKPOINT.value)
  if config.stage != "tokenizer" or "synthetic" not in config.get("data", {}).get("sources", {}):
    raise ValueError(f"{CHECKPOINT.value} must be a tokenizer of ours, whose config names the synthetic source")
  config = detokenize.with_sampler(config, DECODER_STEPS.value, DECODER_GUIDANCE.value, None)
  scenes = pipeline.eval_set(config.data, "synthetic", image_size=config.image_size, num_images=NUM_IMAGES.value)
  num_objects = scenes["num_objects"]
  settings = QUALITY.value, METRIC.value, SEED.value, BATCH_SIZE.value
  lengths, gaps = measure(config, params, scenes["image"], *settings)

  rows = by_objects(num_objects, lengths)
  print(f"{'objects':>8} {'scenes':>7} {'mean length':>12} {'std. error':>11} {'within':>7}")
  within = gaps <= QUALITY.value
  for count, (scenes_of, mean, error) in rows.items():
    share = within[num_objects == count].mean()
    print(f"{count:8d} {scenes_of:7d} {mean:12.2f} {error:11.2f} {share:7.2f}")
  print(f"{'all':>8} {len(lengths):7d} {lengths.mean():12.2f} {'':>11} {within.mean():7.2f}")
  rho = p = np.nan
  if np.ptp(lengths) and np.ptp(num_objects):
    rho, p = scipy.stats.spearmanr(num_objects, lengths)
  print(f"Spearman's rank correlation of length and number of objects: {rho:.3f} (p = {p:.1g})")
  if OUT.value:
    title = f"{METRIC.value} <= {QUALITY.value:g}, {len(lengths)} scenes, rank correlation {rho:.2f}"
    files.write_file(Path(OUT.value), halting_png(rows, title))
    print(f"wrote {OUT.value}")


if __name__ == "__main__":
  cli.run(main)
