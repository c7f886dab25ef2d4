"""Converts checkpoints between the authors' format (or diffusers', for a VAE alone) and ours.

python -m flextok_jax.convert SRC DST [--to=ours|official] [--dtype=bfloat16] [--check]
python -m flextok_jax.convert SRC DST --generator [--setting=name=value ...]
python -m flextok_jax.convert SRC.pth DST.safetensors

SRC is what flextok_jax.load takes, or with --generator flextok_jax.load_ar; generators are written in our format. DST
is a .safetensors file or a folder, and must not exist. The default format is the one that SRC does not have. Prints the
parameters by part. With --check, reads DST back, tokenizes and reconstructs a photograph with both, compares, and
writes the image beside DST; for generators it compares logits.

The third form writes the tensors of a PyTorch file (.pth, .pt, .bin, .ckpt), as networks of metrics are read: float32,
under their names, where keys of nested dictionaries are joined by dots, and a dictionary that alone holds the tensors
("state_dict", "model", ...) is not part of the names. It needs PyTorch and unpickles only tensors and plain values.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax import cli
from flextok_jax.config import TOKENIZER_STAGES
from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.data import transforms
from flextok_jax.data.sources import photos
from flextok_jax.evals import grids
from flextok_jax.evals.metrics import image as metrics
from flextok_jax.inference.generator import ARGenerator, load_ar
from flextok_jax.inference.tokenizer import FlexTok, load
from flextok_jax.tools import convert_torch
from flextok_jax.weights import loading, saving


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_enum(
    "to", None, ["ours", "official"], "Format of DST; default: the other one than SRC's.", flag_values=values
  )
  flags.DEFINE_string(
    "dtype", None, "Type of the arrays written, the VAE's aside; default: as in SRC's config.", flag_values=values
  )
  flags.DEFINE_bool(
    "check", False, "Read DST back, tokenize and reconstruct a photograph with both, compare.", flag_values=values
  )
  flags.DEFINE_integer("vae_norm_num_groups", 32, "GroupNorm groups of an official file's VAE.", flag_values=values)
  flags.DEFINE_integer(
    "mup_base_width", None, "Base width of an official model with a muP readout.", flag_values=values
  )
  flags.DEFINE_integer("image_size", None, "Pixels a side, in place of SRC's own.", flag_values=values)
  flags.DEFINE_bool("generator", False, "SRC is a generator, in the released format or ours.", flag_values=values)
  cli.define_setting_flag(values)


def main(source: str, target: str, values: flags.FlagValues):
  """Converts `source` to `target`."""
  path = cli.local_path(target, "DST")
  if path.exists():
    raise ValueError(f"{path} exists: remove it, or give another DST")
  files.check_writable(path.parent)
  target = str(path)
  if source.endswith(convert_torch.SUFFIXES):
    for name in ("to", "dtype", "check", "generator", "vae_norm_num_groups", "mup_base_width", "image_size", "setting"):
      if values[name].present:
        raise ValueError(f"--{name} has no meaning for a PyTorch file, whose tensors are written as they are")
    count, others = convert_torch.convert(source, target)
    left = f", without {len(others)} others such as {others[0]!r:.80}" if others else ""
    print(f"wrote {count} tensors to {target}{left}")
    return
  if values.generator:
    if values.to == "official":
      raise ValueError("--to=official: generators are only written in our format")
    for name in ("vae_norm_num_groups", "mup_base_width", "image_size"):
      if values[name].present:
        raise ValueError(f"--{name} is of tokenizers: a generator's settings are given as --setting=name=value")
    convert_generator(source, target, values.dtype, cli.parse_settings(values.setting), values.check)
    return
  if values.setting:
    raise ValueError(f"--setting={values.setting[0]} is of generators: give --generator as well")
  options = {name: values[name].value for name in ("dtype", "vae_norm_num_groups", "mup_base_width", "image_size")}
  convert_tokenizer(source, target, values.to, options, values.check)


def convert_tokenizer(source: str, target: str, to: str | None, options: Mapping[str, Any], check: bool):
  """Converts a tokenizer or a VAE, and prints what was written.

  Args:
    source: see flextok_jax.load.
    target: .safetensors file or folder.
    to: "ours" or "official"; None: the other format than the source has.
    options: arguments of flextok_jax.load.
    check: read the target back, tokenize and reconstruct a photograph with both, and compare.

  Raises:
    FileNotFoundError, ValueError: see flextok_jax.load; or a model that the official format cannot express; or a check
      that fails.
  """
  to = to or ("official" if loading.is_ours(source) else "ours")
  model = load(source, **options)
  if to == "official":
    model.to_official(target)
  else:
    write_ours(target, model)
  print(summary(model.params))
  print(f"wrote {target} ({'official format' if to == 'official' else 'flextok_jax'})")
  if check:
    photograph = transforms.center_crop(photos.photo_path("skimage", "astronaut.png"), model.image_size)
    before = reconstruct(model, photograph)
    del model  # two large ones may not fit into memory
    compare(before, reconstruct(load(target, **options), photograph), photograph, Path(target))


def convert_generator(source: str, target: str, dtype: str | None, settings: Mapping[str, Any], check: bool):
  """Converts a generator to our format, and prints what was written.

  Args:
    source, dtype, settings: see flextok_jax.load_ar.
    target: .safetensors file or folder.
    check: read the target back, and compare the logits of random ids.

  Raises:
    FileNotFoundError, ValueError: see flextok_jax.load_ar; or a check that fails.
  """
  gen = load_ar(source, dtype, **settings)
  write_ours(target, gen)
  print(summary(gen.params))
  print(f"wrote {target} (flextok_jax)")
  if check:
    ids = np.random.default_rng(0).integers(0, gen.num_ids, (1, gen.num_tokens))
    text = np.random.default_rng(1).normal(size=(1, 8, gen.config.text.features)).astype(np.float32)
    args = (ids, None, text if gen.config.ar.condition == "text" else None)
    before = np.asarray(gen.logits(*args))
    del gen
    after = np.asarray(load_ar(target, dtype).logits(*args))
    if not np.array_equal(before, after):
      raise ValueError(
        f"{target} does not predict what its source predicts: logits differ by {np.abs(before - after).max()}"
      )
    print(f"checked: the logits of {ids.size} random ids are equal")


def write_ours(target: str, model: FlexTok | ARGenerator):
  """Writes a .safetensors file, or a folder."""
  if target.endswith(".safetensors"):
    saving.save_weights(target, model.config, model.params)
  else:
    model.save(target)


def summary(params: Mapping) -> str:
  """Returns a table of the parameters by part: number, types, size."""
  parts: dict[str, list[jax.Array]] = {}
  for path, array in flatten_dict(params).items():
    parts.setdefault(" ".join(path[:2]), []).append(array)
  rows = [
    (name, sum(a.size for a in arrays), sorted({str(a.dtype) for a in arrays}), sum(a.nbytes for a in arrays))
    for name, arrays in sorted(parts.items())
  ]
  rows.append(
    ("total", sum(row[1] for row in rows), sorted({t for row in rows for t in row[2]}), sum(row[3] for row in rows))
  )
  lines = [f"{'part':<28}{'parameters':>15}{'MiB':>10}  type"]
  lines += [f"{name:<28}{count:>15,}{size / 2**20:>10.1f}  {', '.join(types)}" for name, count, types, size in rows]
  return "\n".join(lines)


def reconstruct(model: FlexTok, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Encodes and decodes an image uint8 [h, w, 3], with the model's own sampler.

  Returns:
    (token ids [n], or of a VAE alone latents [h', w', c]; reconstruction [h, w, 3] in [-1, 1]).
  """
  if model.config.stage not in TOKENIZER_STAGES:
    latents = jnp.asarray(model.encode_latents(image[None]))
    return np.asarray(latents[0]), _clip(model.decode_latents(latents))
  ids = np.asarray(model.tokenize(image[None]))
  return ids[0], _clip(model.detokenize(ids, key=jax.random.key(0)))


def _clip(images: jax.Array) -> np.ndarray:
  """Returns the first of images [b, h, w, 3], clipped to [-1, 1]."""
  return np.clip(np.asarray(images[0]), -1, 1)


def compare(before: tuple, after: tuple, image: np.ndarray, target: Path):
  """Compares the results of `reconstruct` of source and target, and writes image and reconstruction side by side.

  Raises:
    ValueError: they do not agree.
  """
  (code, restored), (other, again) = before, after
  if not np.array_equal(code, other):
    raise ValueError(f"{target} does not encode like its source: {(code != other).sum()} of {code.size} differ")
  gap = float(np.abs(restored - again).max())
  if gap > 1e-4:
    raise ValueError(f"{target} does not decode like its source: images differ by up to {gap:.2g}")
  pair = np.concatenate([image, np.asarray(images_lib.round_to_8bit(again) * 255).round().astype(np.uint8)], axis=1)
  picture = target.with_name(f"{target.stem}_check.png")
  files.write_file(picture, grids.to_png(pair))
  psnr = float(metrics.psnr(jnp.asarray(image[None] / np.float32(255)), images_lib.round_to_8bit(again[None]))[0])
  kind = "tokens" if code.ndim == 1 else "latent values"
  print(f"checked: all {code.size} {kind} equal, images within {gap:.0e}, PSNR {psnr:.2f} dB")
  print(f"photograph and reconstruction: {picture}")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda source, target: main(source, target, flags.FLAGS), ("SRC", "DST"))
