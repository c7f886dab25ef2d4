"""Turns token ids back into images, from any number of tokens.

python -m flextok_jax.detokenize --checkpoint=PATH --tokens=tokens.json --out=DIR [--num_tokens=K]

Reads the files that flextok_jax.tokenize writes; in JSON only "token_ids" is needed, and its sequences may have
different lengths: each image is decoded from as many tokens as its sequence has.
"""

from pathlib import Path

from absl import flags

from flextok_jax import cli
from flextok_jax.config import with_fields
from flextok_jax.core import files
from flextok_jax.evals import grids
from flextok_jax.inference import decoding, token_files
from flextok_jax.ops import fsq
from flextok_jax.stages import make_stage
from flextok_jax.weights import loading


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("checkpoint", None, "A tokenizer: file, folder or hub repository.", flag_values=values)
  flags.DEFINE_string("tokens", None, "Token file, .json or .npz (see flextok_jax.tokenize).", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the PNG files, <entry>_<name>.png.", flag_values=values)
  flags.DEFINE_integer(
    "num_tokens", None, "Decode from the first so many tokens; default: all in the file.", flag_values=values
  )
  flags.DEFINE_integer("num_steps", None, "Euler steps; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_string("guidance", None, "apg, cfg or none; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_float("guidance_scale", None, "1 is no guidance; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_integer(
    "seed", 0, "Of the noise; entry i has that of image i in an evaluation of the same seed.", flag_values=values
  )
  flags.DEFINE_integer("batch_size", 32, "Images at once.", flag_values=values)


def main(values: flags.FlagValues):
  """Decodes values.tokens into PNG files under values.out."""
  for name in ("checkpoint", "tokens", "out"):
    if not values[name].value:
      raise ValueError(f"--{name} is missing")
  if values.batch_size < 1:
    raise ValueError(f"--batch_size={values.batch_size} must be at least 1")
  config, params = loading.load(values.checkpoint)
  sampler = decoding.override_sampler(config.sampler, values.num_steps, values.guidance, values.guidance_scale)
  config = with_fields(config, {f"sampler.{name}": value for name, value in sampler.items()})
  predict_fns = make_stage(config).predict_fns
  if "detokenize" not in predict_fns:
    raise ValueError(f"{values.checkpoint} is a model of stage {config.stage!r}, which has no tokens")
  num_registers, num_codes = config.tokens.num_registers, fsq.num_codes(config.tokens.levels)
  names, sequences = token_files.read_tokens(Path(values.tokens), config.image_size, num_registers, num_codes)
  sequences = token_files.cut(sequences, values.num_tokens, num_registers)
  out = Path(values.out)
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out={out} is a file: give a folder")
  decode = decoding.decoder_by_image(predict_fns["detokenize"], values.seed)
  images = decoding.detokenize(decode, params, sequences, num_registers, values.batch_size)
  for i, (name, image) in enumerate(zip(names, images)):
    files.write_file(out / f"{i:05d}_{Path(name).stem}.png", grids.to_png(image))
  print(f"wrote {len(names)} images of {config.image_size} px to {out}")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
