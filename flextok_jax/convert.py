"""Converts checkpoints between the authors' format (or diffusers', for a VAE alone) and ours.

python -m flextok_jax.convert SRC DST [--to=ours|official] [--dtype=bfloat16] [--check]

SRC is whatever flextok_jax.load takes. DST is a .safetensors file or a folder, and must not exist. By default the other
format is written than SRC has. Prints the parameters by part; with --check reads DST back, tokenizes and reconstructs a
photograph with both, compares, and writes the picture beside DST.
"""

from collections.abc import Mapping
import os
from pathlib import Path

from absl import flags
from flax.traverse_util import flatten_dict
import jax
import numpy as np

from flextok_jax import api, cli, files
from flextok_jax.checkpoints import loading, saving
from flextok_jax.data import photos, transforms
from flextok_jax.evals import metrics, plots


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_enum("to", None, ["ours", "official"], "Format of DST; default: the other one than SRC's.",
                    flag_values=values)
  flags.DEFINE_string("dtype", None, "Type of the arrays written, the VAE's aside; default: as in SRC's config.",
                      flag_values=values)
  flags.DEFINE_bool("check", False, "Read DST back, tokenize and reconstruct a photograph with both, compare.",
                    flag_values=values)
  flags.DEFINE_integer("vae_norm_num_groups", 32, "GroupNorm groups of an official file's VAE.", flag_values=values)
  flags.DEFINE_integer("mup_base_width", None, "Base width of an official model with a muP readout.",
                       flag_values=values)
  flags.DEFINE_integer("image_size", None, "Pixels a side, in place of SRC's own.", flag_values=values)


def main(source: str, target: str, values: flags.FlagValues):
  """Converts `source` to `target`."""
  if os.path.exists(target):
    raise ValueError(f"{target} is there already: remove it, or give another DST")
  to = values.to or ("official" if loading.is_ours(source) else "ours")
  names = ("dtype", "vae_norm_num_groups", "mup_base_width", "image_size")
  given = {name: values[name].value for name in names}
  model = api.load(source, **given)
  if to == "official":
    model.to_official(target)
  elif target.endswith(".safetensors"):
    saving.save_weights(target, model.config, model.params)
  else:
    model.save(target)
  print(summary(model.params))
  print(f"wrote {target} ({'official format' if to == 'official' else 'flextok_jax'})")
  if values.check:
    photograph = transforms.center_crop(photos.photo_path("skimage", "astronaut.png"), model.image_size)
    before = reconstruct(model, photograph)
    del model  # two large ones need not fit
    check(before, reconstruct(api.load(target, **given), photograph), photograph, Path(target))


def summary(params: Mapping) -> str:
  """Returns a table of the parameters by part: number, types, size."""
  parts: dict[str, list[jax.Array]] = {}
  for path, array in flatten_dict(params).items():
    parts.setdefault(" ".join(path[:2]), []).append(array)
  rows = [(name, sum(a.size for a in arrays), sorted({str(a.dtype) for a in arrays}), sum(a.nbytes for a in arrays))
          for name, arrays in sorted(parts.items())]
  rows.append(("total", sum(row[1] for row in rows), sorted({t for row in rows for t in row[2]}),
               sum(row[3] for row in rows)))
  lines = [f"{'part':<28}{'parameters':>15}{'MiB':>10}  type"]
  lines += [f"{name:<28}{count:>15,}{size / 2**20:>10.1f}  {', '.join(types)}" for name, count, types, size in rows]
  return "\n".join(lines)


def reconstruct(model: api.FlexTok, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns token ids (of a VAE alone latents) and reconstruction [h, w, 3] in [-1, 1] of an image uint8 [h, w, 3]."""
  if model.config.stage != "tokenizer":
    code = model.encode_latents(image[None])
    restored = model.decode_latents(code)
  else:
    code, s = model.tokenize(image[None]), model.config.sampler
    mode = None if s.guidance == "none" else s.guidance
    restored = model.detokenize(code, key=jax.random.key(0), num_steps=s.num_steps, guidance=mode,
                                guidance_scale=s.guidance_scale)
  return np.asarray(code[0]), np.clip(np.asarray(restored[0]), -1, 1)


def check(before: tuple, after: tuple, image: np.ndarray, target: Path):
  """Compares what `reconstruct` gave before and after, and writes image and reconstruction side by side.

  Raises:
    ValueError: they do not agree.
  """
  (code, restored), (other, again) = before, after
  if not np.array_equal(code, other):
    raise ValueError(f"{target} does not encode as its source does: {(code != other).sum()} of {code.size} differ")
  gap = float(np.abs(restored - again).max())
  if gap > 1e-4:
    raise ValueError(f"{target} does not decode as its source does: images differ by up to {gap:.2g}")
  pair = np.concatenate([image, np.asarray(metrics.round_to_8bit(again) * 255).round().astype(np.uint8)], axis=1)
  picture = target.with_name(f"{target.stem}_check.png")
  files.write_file(picture, plots.to_png(pair))
  psnr = float(metrics.psnr(image[None] / np.float32(255), metrics.round_to_8bit(again[None]))[0])
  kind = "tokens" if code.ndim == 1 else "latent values"
  print(f"checked: all {code.size} {kind} equal, images within {gap:.0e}, PSNR {psnr:.2f} dB")
  print(f"photograph and reconstruction: {picture}")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda source, target: main(source, target, flags.FLAGS), ("SRC", "DST"))
