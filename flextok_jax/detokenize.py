"""Turns token ids back into images, from any number of tokens.

python -m flextok_jax.detokenize --checkpoint=PATH --tokens=tokens.json --out=DIR [--num_tokens=K]

Reads the files that flextok_jax.tokenize writes; in JSON only "token_ids" is needed, and its sequences may have
different lengths: each image is decoded from as many tokens as its sequence has.
"""

from collections.abc import Callable, Iterator
import json
from pathlib import Path
from typing import Any

from absl import flags
import jax
import numpy as np

from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.evals import plots, reconstruction
from flextok_jax.ops import fsq, nested
from flextok_jax.ops import guidance as guidance_lib
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
  config = with_sampler(config, values.num_steps, values.guidance, values.guidance_scale)
  predict_fns = make_stage(config).predict_fns
  if "detokenize" not in predict_fns:
    raise ValueError(f"{values.checkpoint} is a model of stage {config.stage!r}, which has no tokens")
  num_registers, num_codes = config.tokens.num_registers, fsq.num_codes(config.tokens.levels)
  names, sequences = read_tokens(Path(values.tokens), config.image_size, num_registers, num_codes)
  sequences = cut(sequences, values.num_tokens, num_registers)
  out = Path(values.out)
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out={out} is a file: give a folder")
  decode = reconstruction.decoder_by_image(predict_fns["detokenize"], values.seed)
  images = detokenize(decode, params, sequences, num_registers, values.batch_size)
  for i, (name, image) in enumerate(zip(names, images)):
    files.write_file(out / f"{i:05d}_{Path(name).stem}.png", plots.to_png(image))
  print(f"wrote {len(names)} images of {config.image_size} px to {out}")


def with_sampler(config, num_steps: int | None, guidance: str | None, guidance_scale: float | None):
  """Returns the config with the sampler settings that are not None in place of its own."""
  config = config.copy_and_resolve_references()
  given = {"num_steps": num_steps, "guidance": guidance, "guidance_scale": guidance_scale}
  config.sampler.update({k: v for k, v in given.items() if v is not None})
  s = config.sampler
  if s.num_steps < 1:
    raise ValueError(f"--num_steps={s.num_steps} must be at least 1")
  guidance_lib.check_mode(s.guidance)
  if not np.isfinite(s.guidance_scale):
    raise ValueError(f"--guidance_scale={s.guidance_scale} must be finite")
  if s.guidance == "none" and guidance_scale is not None:
    raise ValueError("--guidance_scale has no effect where guidance is 'none': give --guidance=apg or cfg as well")
  return config


def read_tokens(path: Path, image_size: int, num_registers: int, num_codes: int) -> tuple[list[str], list[list[int]]]:
  """Reads and checks a token file.

  Returns:
    (names, token ids): an entry an image, each of 1 to num_registers ids in [0, num_codes).

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged file, or tokens that do not fit the model.
  """
  fields = _read_fields(path)
  if "token_ids" not in fields:
    raise ValueError(f"{path} has no 'token_ids'")
  sequences = fields["token_ids"]
  if not isinstance(sequences, list) or not sequences or not all(isinstance(s, list) for s in sequences):
    raise ValueError(f"{path}: 'token_ids' must be a list of one or more lists of ids")
  if fields.get("image_size", image_size) != image_size:
    raise ValueError(
      f"{path} holds tokens of {fields['image_size']} px images, but this checkpoint makes"
      f" {image_size} px images: use the checkpoint that wrote them"
    )
  names = fields.get("names", [str(i) for i in range(len(sequences))])
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError(f"{path}: 'names' must be a list of strings")
  if len(names) != len(sequences):
    raise ValueError(f"{path} has {len(names)} names for {len(sequences)} token sequences")
  for i, sequence in enumerate(sequences):
    if not 1 <= len(sequence) <= num_registers:
      raise ValueError(f"{path}: token_ids[{i}] has {len(sequence)} tokens, this model takes 1 to {num_registers}")
    for j, token in enumerate(sequence):
      if type(token) is not int or not 0 <= token < num_codes:  # not isinstance: True is an int
        raise ValueError(f"{path}: token_ids[{i}][{j}] is {token!r}, this model's ids are 0 to {num_codes - 1}")
  return names, sequences


def _read_fields(path: Path) -> dict:
  """Returns the content of a token file as plain Python values."""
  if path.suffix not in (".json", ".npz"):
    raise ValueError(f"--tokens={path} must end in .json or .npz")
  if not path.is_file():
    raise FileNotFoundError(f"no token file at {path}")
  try:
    if path.suffix == ".json":
      fields = json.loads(path.read_bytes())
    else:
      with np.load(path, allow_pickle=False) as arrays:
        fields = {name: arrays[name].tolist() for name in arrays.files}
  except Exception as e:  # json, zipfile, zlib and numpy raise many kinds for a damaged file
    raise ValueError(f"{path} is not a whole {path.suffix} token file ({type(e).__name__}): write it again") from e
  if not isinstance(fields, dict):
    raise ValueError(f"{path} must hold an object with 'token_ids', not a {type(fields).__name__}")
  return fields


def cut(sequences: list[list[int]], num_tokens: int | None, num_registers: int) -> list[list[int]]:
  """Returns the first num_tokens of every sequence; None leaves them whole."""
  if num_tokens is None:
    return sequences
  reconstruction.token_counts((num_tokens,), num_registers)
  for i, sequence in enumerate(sequences):
    if len(sequence) < num_tokens:
      raise ValueError(f"--num_tokens={num_tokens}, but token_ids[{i}] has only {len(sequence)} tokens")
  return [sequence[:num_tokens] for sequence in sequences]


def detokenize(
  decode: Callable, params: Any, sequences: list[list[int]], num_registers: int, batch_size: int
) -> Iterator[np.ndarray]:
  """Yields the image, uint8 [h, w, 3], of each sequence of 1 to num_registers ids; decode as of decoder_by_image."""
  restore = jax.jit(lambda *args: images_lib.round_to_8bit(decode(*args)) * 255)
  count = len(sequences)
  keep_k = np.asarray([len(sequence) for sequence in sequences], np.int32)
  slots = nested.slots(int(keep_k.max()), num_registers)
  ids = np.zeros((count, slots), np.int32)  # ids at or past keep_k have no influence
  for row, sequence in zip(ids, sequences):
    row[: len(sequence)] = sequence
  batch_size = min(batch_size, count)
  for start in range(0, count, batch_size):
    index = np.arange(start, start + batch_size, dtype=np.int32)
    rows = np.minimum(index, count - 1)  # the last batch is padded with the last sequence
    images = np.asarray(restore(params, ids[rows], keep_k[rows], index))
    yield from images[: count - start].round().astype(np.uint8)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
