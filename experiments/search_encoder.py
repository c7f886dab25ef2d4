"""Is search a better encoder? PSNR of the first tokens by the encoder, and of tokens searched for with `psnr`.

python -m experiments.search_encoder --tokenizer=FILE [--generator=FILE] [--source=synthetic] [--num_images=32]
    [--counts=4,8] [--beam_width=4] [--candidates=64] [--decoder_steps=4] --out=DIR

Both are decoded from the same noise, by the tokenizer's own sampler or in unguided Euler steps. Candidates come from
the generator, by class or caption, or are drawn uniformly without one. Writes search_encoder.json.
"""

import json
from pathlib import Path

from absl import flags
import jax
import numpy as np

from experiments import search_curves
import flextok_jax
from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.data import pipeline
from flextok_jax.inference import search
from flextok_jax.training import inputs


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("tokenizer", None, "Anything that load takes.", flag_values=values)
  flags.DEFINE_string("generator", None, "Of its tokens; default: uniform codes.", flag_values=values)
  flags.DEFINE_string("source", "synthetic", "Of the images.", flag_values=values)
  flags.DEFINE_integer("num_images", 32, "Held-out images.", flag_values=values)
  flags.DEFINE_list("counts", ["4", "8"], "Numbers of tokens.", flag_values=values)
  flags.DEFINE_integer("beam_width", 4, "Of the search.", flag_values=values)
  flags.DEFINE_integer("candidates", 64, "Of the search.", flag_values=values)
  flags.DEFINE_integer("decoder_steps", 0, "Unguided Euler steps; 0: the tokenizer's sampler.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the results.", flag_values=values)


def main(values: flags.FlagValues):
  """Compares the two, and writes the results."""
  cli.require(values, "tokenizer", "out")
  model = search_curves.load_tokenizer(values)
  found = pipeline.eval_set(
    inputs.image_data(model.config), values.source, image_size=model.image_size, num_images=values.num_images
  )
  images, keys = found["image"], jax.random.split(jax.random.key(0), values.num_images)
  ids = np.asarray(model.tokenize(images))
  condition = {}
  prior = flextok_jax.UniformPrior(model)
  if values.generator:
    prior = flextok_jax.load_ar(values.generator)
    text = prior.config.ar.condition == "text"
    condition = {"prompts": found["caption"]} if text else {"labels": found["label"]}
  settings = ("tokenizer", "generator", "source", "num_images", "candidates", "decoder_steps")
  report = {name: values[name].value for name in settings}
  for count in cli.numbers("counts", values.counts):
    schedule = tuple(range(1, count + 1)) if not values.generator else tuple(2**i for i in range(count.bit_length()))
    searched = prior.search(
      keys, verifier="psnr", references=images, beam_width=values.beam_width, candidates=values.candidates,
      schedule=schedule, **condition, **({"tokenizer": model} if values.generator else {}),
    )  # fmt: skip
    plain = psnr(search.decode(model, ids[:, :count], None, keys, 64), images)
    report[f"{count} tokens"] = {
      "encoder": plain.mean(),
      "search": searched.scores[:, 0].mean(),
      "better": float((searched.scores[:, 0] > plain).mean()),
      "decoded": searched.decoded,
    }
    print(count, json.dumps(report[f"{count} tokens"]), flush=True)
  files.write_file(Path(values.out) / "search_encoder.json", (json.dumps(report, indent=1) + "\n").encode())


def psnr(pictures: np.ndarray, images: np.ndarray) -> np.ndarray:
  """Returns the PSNR in dB of pictures in [-1, 1] against images uint8, both [n, h, w, 3]."""
  return -10 * np.log10(np.square((np.clip(pictures, -1, 1) + 1) / 2 - images / 255).mean((1, 2, 3)))


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
