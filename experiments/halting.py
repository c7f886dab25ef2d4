"""Does the adaptive length follow what is in a picture? Mean length by number of objects, and their rank correlation.

python -m experiments.halting --checkpoint=FILE --quality=0.02 [--metric=mse] [--decoder_steps=1] [--num_images=256]
    [--out=halting.png]

On validation scenes of the `synthetic` source, in the style of the checkpoint's own config, where the number of objects
is known (flextok_jax/evals/studies/halting.py).
"""

from pathlib import Path

from absl import flags

from flextok_jax import cli
from flextok_jax.config import with_fields
from flextok_jax.core import files
from flextok_jax.data import pipeline
from flextok_jax.evals import figures
from flextok_jax.evals.metrics import measures
from flextok_jax.evals.studies import halting
from flextok_jax.inference import decoding
from flextok_jax.ops import distances, guidance
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.weights import loading

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A tokenizer: file, folder or hub repository.")
QUALITY = flags.DEFINE_float("quality", None, "Largest distance of a reconstruction that is good enough.")
METRIC = flags.DEFINE_enum("metric", "mse", list(distances.DISTANCES), "The distance.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 256, "Scenes.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Scenes at once.")
DECODER_STEPS = flags.DEFINE_integer("decoder_steps", None, "Euler steps; default: the checkpoint's.", 1)
DECODER_GUIDANCE = flags.DEFINE_enum("decoder_guidance", None, guidance.MODES, "Default: the checkpoint's.")
SEED = flags.DEFINE_integer("seed", 0, "Of the noise that all scenes share.")
OUT = flags.DEFINE_string("out", None, "PNG file for mean length against number of objects; default: none.")


def main():
  if not CHECKPOINT.value or QUALITY.value is None:
    raise ValueError("give --checkpoint=FILE and --quality=DISTANCE")
  if BATCH_SIZE.value < 1:
    raise ValueError(f"--batch_size={BATCH_SIZE.value} must be at least 1")
  config, params = loading.load(CHECKPOINT.value)
  if config.stage != "tokenizer" or "synthetic" not in config.get("data", {}).get("sources", {}):
    raise ValueError(f"{CHECKPOINT.value} must be a tokenizer of ours, whose config names the synthetic source")
  with cli.renamed(**cli.DECODER_FLAGS):
    sampler = decoding.override_sampler(config.sampler, DECODER_STEPS.value, DECODER_GUIDANCE.value, None)
  config = with_fields(config, {f"sampler.{name}": value for name, value in sampler.items()})
  scenes = pipeline.eval_set(config.data, "synthetic", image_size=config.image_size, num_images=NUM_IMAGES.value)
  num_objects = scenes["num_objects"]
  mesh, measure = sharding.make_mesh(), measures.make([METRIC.value])[METRIC.value]
  lengths_fn = halting.make_lengths(config, params, METRIC.value, measure, SEED.value, BATCH_SIZE.value, mesh)
  ids = decoding.tokenize(make_stage(config).predict_fns["tokenize"], params, scenes["image"], BATCH_SIZE.value)
  lengths, gaps = lengths_fn(scenes["image"], ids, QUALITY.value)

  rows = halting.by_objects(num_objects, lengths)
  print(f"{'objects':>8} {'scenes':>7} {'mean length':>12} {'95% interval':>15} {'within':>7}")
  within = gaps <= QUALITY.value
  for count, (scenes_of, (mean, *interval)) in rows.items():
    share = within[num_objects == count].mean()
    print(f"{count:8d} {scenes_of:7d} {mean:12.2f} {' to '.join(f'{x:.2f}' for x in interval):>15} {share:7.2f}")
  print(f"{'all':>8} {len(lengths):7d} {lengths.mean():12.2f} {'':>15} {within.mean():7.2f}")
  rho, p = halting.rank_correlation(num_objects, lengths)
  if rho is not None:
    print(f"Spearman's rank correlation of length and number of objects: {rho:.3f} (p = {p:.1g})")
  if OUT.value:
    title = f"tokens, {METRIC.value} <= {QUALITY.value:g}, {len(lengths)} scenes"
    line = figures.Line(list(rows), [mean for _, mean in rows.values()])
    files.write_file(Path(OUT.value), figures.curves({}, "", (), {"objects in the scene": {title: {"": line}}}))
    print(f"wrote {OUT.value}")


if __name__ == "__main__":
  cli.run(main)
