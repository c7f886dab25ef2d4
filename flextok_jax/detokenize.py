"""Turns token ids back into images, from any number of tokens.

python -m flextok_jax.detokenize --checkpoint=PATH --tokens=tokens.json --out=DIR [--num_tokens=K]

Reads the files that flextok_jax.tokenize writes (inference/token_files.py). In JSON only "token_ids" is needed, and its
sequences may have different lengths: each image is decoded from all tokens of its sequence.
"""

from pathlib import Path

from absl import flags
import jax

from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.core.progress import track
from flextok_jax.evals import grids
from flextok_jax.inference import batches, token_files, validation
from flextok_jax.inference.tokenizer import load_tokenizer


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


def main(values: flags.FlagValues):
  """Decodes values.tokens into PNG files under values.out."""
  cli.require(values, "checkpoint", "tokens", "out")
  out = cli.out_folder(values)
  validation.seed(values.seed)
  model = load_tokenizer(
    values.checkpoint, num_steps=values.num_steps, guidance=values.guidance, guidance_scale=values.guidance_scale
  )
  facts = token_files.Facts(model.fingerprint, model.image_size, model.num_registers)
  names, sequences = token_files.read_tokens(Path(values.tokens), facts, model.num_codes)
  sequences = token_files.cut(sequences, values.num_tokens, model.num_registers)
  files.clear_leftovers(out)
  images = batches.detokenize(model, sequences, jax.random.key(values.seed), values.batch_size)
  for i, image in enumerate(track(images, len(names), "images decoded")):
    files.write_file(out / f"{i:05d}_{token_files.file_stem(names[i])}.png", grids.to_png(image))
  print(f"wrote {len(names)} images of {model.image_size} px to {out}")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
