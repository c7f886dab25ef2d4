"""Does the adaptive length follow the image? Mean length by number of objects, and their rank correlation.

python -m experiments.halting --checkpoint=FILE --quality=0.02 [--metric=mse] [--decoder_steps=1] [--num_images=256]
    [--out=halting.png]

The images are validation scenes of the `synthetic` source, in the style of the checkpoint's config, for which the
number of objects is known (flextok_jax/evals/studies/halting.py).
"""

import functools
from pathlib import Path

from absl import flags

from flextok_jax import cli
from flextok_jax.config import with_fields
from flextok_jax.core import files
from flextok_jax.evals import charts
from flextok_jax.evals.metrics import image
from flextok_jax.evals.studies import halting
from flextok_jax.evals.studies.subject import Subject
from flextok_jax.inference import decoding
from flextok_jax.ops import distances, guidance
from flextok_jax.parallel import sharding
from flextok_jax.weights import loading


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  enum = functools.partial(flags.DEFINE_enum, flag_values=values)
  string("checkpoint", None, "A tokenizer: file, folder or hub repository.")
  flags.DEFINE_float("quality", None, "Largest distance of a good enough reconstruction.", flag_values=values)
  enum("metric", "mse", list(distances.DISTANCES), "The distance.")
  integer("num_images", 256, "Scenes.")
  integer("batch_size", 64, "Scenes per batch.", 1)
  integer("decoder_steps", None, "Euler steps; default: from the checkpoint.", 1)
  enum("decoder_guidance", None, guidance.MODES, "Default: from the checkpoint.")
  integer("seed", 0, "Seed of the noise that all scenes share.")
  string("out", None, "PNG file for mean length against number of objects; default: none.")


def main(values: flags.FlagValues):
  """Measures what the flags ask for."""
  if not values.checkpoint or values.quality is None:
    raise ValueError("give --checkpoint=FILE and --quality=DISTANCE")
  config, params = loading.load(values.checkpoint)
  if config.stage != "tokenizer" or not config.data.sources.synthetic.weight:
    raise ValueError(f"{values.checkpoint} must be a tokenizer that was trained on the synthetic source")
  with cli.renamed(**cli.DECODER_FLAGS):
    sampler = decoding.override_sampler(
      config.sampler, num_steps=values.decoder_steps, guidance=values.decoder_guidance
    )
  fields = {f"sampler.{name}": value for name, value in sampler.items()}
  fields |= {"eval.num_images": values.num_images, "eval.batch_size": values.batch_size, "seed": values.seed}
  fields["eval.sources"] = ("synthetic",)
  metrics = image.make_metrics([values.metric])
  subject = Subject(with_fields(config, fields), params, metrics, sharding.make_mesh())
  num_objects = subject.sets["synthetic"]["num_objects"]
  lengths, gaps = halting.make_lengths(subject, values.metric)(*subject.encoded("synthetic"), values.quality)

  rows = halting.by_objects(num_objects, lengths)
  print(f"{'objects':>8} {'scenes':>7} {'mean length':>12} {'95% interval':>15} {'within':>7}")
  within = gaps <= values.quality
  for count, (scenes_of, (mean, *interval)) in rows.items():
    share = within[num_objects == count].mean()
    print(f"{count:8d} {scenes_of:7d} {mean:12.2f} {' to '.join(f'{x:.2f}' for x in interval):>15} {share:7.2f}")
  print(f"{'all':>8} {len(lengths):7d} {lengths.mean():12.2f} {'':>15} {within.mean():7.2f}")
  rho, p = halting.rank_correlation(num_objects, lengths)
  if rho is not None:
    print(f"Spearman's rank correlation of length and number of objects: {rho:.3f} (p = {p:.1g})")
  if values.out:
    title = f"tokens, {values.metric} <= {values.quality:g}, {len(lengths)} scenes"
    line = charts.Line(list(rows), [mean for _, mean in rows.values()])
    files.write_file(Path(values.out), charts.curves({}, "", (), {"objects in the scene": {title: {"": line}}}))
    print(f"wrote {values.out}")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
