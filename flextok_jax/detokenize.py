"""Turns token ids back into images, from any number of tokens.

python -m flextok_jax.detokenize --checkpoint=PATH --tokens=tokens.json --out=DIR [--num_tokens=K]

Reads the files that flextok_jax.tokenize writes (inference/token_files.py). In JSON only "token_ids" is needed, and its
sequences may have different lengths: each image is decoded from all tokens of its sequence, at its size if the file
says it.
"""

from collections.abc import Iterable
from pathlib import Path

from absl import flags
import jax
import numpy as np

from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.core.progress import track
from flextok_jax.evals import grids
from flextok_jax.inference import batches, token_files, validation
from flextok_jax.inference.tokenizer import load_tokenizer, with_positions


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("checkpoint", None, "A tokenizer: file, folder or hub repository.", flag_values=values)
  flags.DEFINE_string("tokens", None, "Token file, .json or .npz (see flextok_jax.tokenize).", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the PNG files, <entry>_<name>.png.", flag_values=values)
  flags.DEFINE_integer(
    "num_tokens", None, "Decode from this many first tokens; default: all in the file.", flag_values=values
  )
  flags.DEFINE_integer("num_steps", None, "Euler steps; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_string("guidance", None, "apg, cfg or none; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_float("guidance_scale", None, "1: off; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_integer(
    "seed",
    0,
    "Of the noise: entry i has that of image i of FlexTok.detokenize with jax.random.key(seed).",
    flag_values=values,
  )
  flags.DEFINE_integer("batch_size", 32, "Images per batch.", flag_values=values)
  cli.define_posemb_flag(values)
  cli.define_tile_flag(values)


def main(values: flags.FlagValues):
  """Decodes values.tokens into PNG files under values.out."""
  cli.require(values, "checkpoint", "tokens", "out")
  out = cli.out_folder(values)
  validation.seed(values.seed)
  model = load_tokenizer(
    values.checkpoint,
    num_steps=values.num_steps,
    guidance=values.guidance,
    guidance_scale=values.guidance_scale,
    vae_tile=values.vae_tile,
  )
  own = model.fingerprint if values.posemb_scaling else ""  # that of ids that a generator has drawn
  model = with_positions(model, values.posemb_scaling)
  facts = token_files.Facts(model.fingerprint, model.image_size, model.num_registers)
  names, sequences, sizes = token_files.read_tokens(Path(values.tokens), facts, model.num_codes, own)
  sequences = token_files.cut(sequences, values.num_tokens, model.num_registers)
  for size in dict.fromkeys(sizes or ()):
    model.latent_shape_of(size)  # raises for a size that this model cannot decode
  files.clear_leftovers(out)
  key = jax.random.key(values.seed)
  images: Iterable[tuple[int, np.ndarray]]
  if sizes is None:
    images = enumerate(batches.detokenize(model, sequences, key, values.batch_size))
  else:
    jobs = [(i, len(ids)) for i, ids in enumerate(sequences)]
    found = batches.decode_prefixes(model, sequences, jobs, key, values.batch_size, sizes)
    images = ((i, image) for (i, _), image in found)
  for i, image in track(images, len(names), "images decoded"):
    files.write_file(out / f"{i:05d}_{token_files.file_stem(names[i])}.png", grids.to_png(image))
  what = f"{model.image_size} px" if sizes is None else f"{len(set(sizes))} sizes"
  print(f"wrote {len(names)} images of {what} to {out}")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
