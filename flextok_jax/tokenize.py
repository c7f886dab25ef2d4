"""Turns images into token ids.

python -m flextok_jax.tokenize --checkpoint=PATH --images=FILE_OR_FOLDER[,...] --out=tokens.json [--num_tokens=K]

A token file is JSON, {"image_size": pixels, "num_tokens": K, "names": [n], "token_ids": [n][K]}, or an .npz of the same
four arrays (no pickles inside).
"""

import functools
import io
import json
from pathlib import Path

from absl import flags
import jax
import numpy as np

from flextok_jax import cli, files
from flextok_jax.checkpoints import loading
from flextok_jax.data import transforms
from flextok_jax.evals import reconstruction
from flextok_jax.ops import nested
from flextok_jax.stages import make_stage


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("checkpoint", None, "A tokenizer: file, folder or hub repository.", flag_values=values)
  flags.DEFINE_list("images", None, "Image files and folders, separated by commas.", flag_values=values)
  flags.DEFINE_string("out", None, "File to write: .json or .npz.", flag_values=values)
  flags.DEFINE_integer("num_tokens", None, "Tokens to write an image; default: all.", flag_values=values)
  flags.DEFINE_integer("batch_size", 32, "Images at once.", flag_values=values)


def main(values: flags.FlagValues):
  """Tokenizes values.images into values.out."""
  for name in ("checkpoint", "images", "out"):
    if not values[name].value:
      raise ValueError(f"--{name} is missing")
  out = Path(values.out)
  if out.suffix not in (".json", ".npz"):
    raise ValueError(f"--out={out} must end in .json or .npz")
  if values.batch_size < 1:
    raise ValueError(f"--batch_size={values.batch_size} must be at least 1")
  config, params = loading.load(values.checkpoint)
  predict_fns = make_stage(config).predict_fns
  if "tokenize" not in predict_fns:
    raise ValueError(f"{values.checkpoint} is a model of stage {config.stage!r}, which has no tokens")
  registers = config.tokens.num_registers
  (num_tokens,) = reconstruction.token_counts(
      (registers if values.num_tokens is None else values.num_tokens,), registers)

  images, names = transforms.load_images(values.images, config.image_size)
  tokenize_fn = functools.partial(predict_fns["tokenize"], num_tokens=nested.slots(num_tokens - 1, registers))
  token_ids = tokenize(tokenize_fn, params, images, values.batch_size)[:, :num_tokens]
  write_tokens(out, config.image_size, names, token_ids)
  print(f"wrote {out}: {len(names)} images of {config.image_size} px, {num_tokens} tokens each")


def tokenize(tokenize_fn, params, images: np.ndarray, batch_size: int) -> np.ndarray:
  """Tokenizes images uint8 [n, h, w, 3] batch by batch, the last one padded: int32 [n, k]."""
  tokenize_fn = jax.jit(tokenize_fn)
  batch_size = min(batch_size, len(images))
  ids = []
  for start in range(0, len(images), batch_size):
    rows = images[start : start + batch_size]
    padding = batch_size - len(rows)
    batch = np.pad(rows, ((0, padding), (0, 0), (0, 0), (0, 0)), mode="edge")
    ids.append(np.asarray(tokenize_fn(params, batch))[: len(rows)])
  return np.concatenate(ids)


def write_tokens(path: Path, image_size: int, names: list[str], token_ids: np.ndarray):
  """Writes a token file, whole or not at all: token_ids int32 [n, k], a name an entry."""
  if path.suffix == ".npz":
    buffer = io.BytesIO()
    np.savez(buffer, image_size=image_size, num_tokens=token_ids.shape[1], names=np.asarray(names, np.str_),
             token_ids=token_ids.astype(np.int32))
    files.write_file(path, buffer.getvalue())
    return
  fields = {"image_size": image_size, "num_tokens": token_ids.shape[1], "names": list(names),
            "token_ids": token_ids.tolist()}
  files.write_file(path, (json.dumps(fields) + "\n").encode())


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
