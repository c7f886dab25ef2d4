"""Turns images into token ids, or into shards: of token ids, of a VAE's latents, of a teacher's features, or of files.

python -m flextok_jax.tokenize --checkpoint=PATH --images=FILE_OR_FOLDER[,...] --out=tokens.json [--num_tokens=K]
python -m flextok_jax.tokenize --checkpoint=PATH --config=FILE --out=DIR [--split=validation] [--num_images=N]
    [--copies=K] [--quality=Q]
python -m flextok_jax.tokenize --what=latents --checkpoint=PATH --config=FILE --out=DIR [--copies=K] [--dtype=bfloat16]
python -m flextok_jax.tokenize --what=dino --config=FILE --out=DIR [--copies=K] [--dtype=bfloat16]
python -m flextok_jax.tokenize --what=images --config=FILE --out=DIR

The first makes a token file: JSON, {"image_size": pixels, "num_tokens": K, "names": [n], "token_ids": [n][K]}, or an
.npz of the same four arrays (no pickles inside). The others make shards of the sources of config.data (data/
shard_files.py): token ids for training stage "ar", latents for training stage "tokenizer" without the VAE's encoder,
features of the teacher of config.repa for its REPA beside them, image files for fast reading
(data.sources.arrayrecord). Killed and rerun, they go on.
"""

import functools
from pathlib import Path

from absl import flags
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np

from flextok_jax import cli
from flextok_jax.config import with_fields
from flextok_jax.core.images import to_float
from flextok_jax.data import transforms
from flextok_jax.data.shards import files as shard_files
from flextok_jax.data.shards import writer as shard_writer
from flextok_jax.data.shards.features import FeatureShards
from flextok_jax.data.shards.images import ImageRecords
from flextok_jax.data.shards.latents import DTYPES, LatentShards
from flextok_jax.data.shards.tokens import TokenRecords
from flextok_jax.inference import decoding, token_files
from flextok_jax.ops import fsq, guidance, nested
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage, repa
from flextok_jax.stages.vae import make_vae
from flextok_jax.training import inputs, teacher
from flextok_jax.weights import fingerprints, loading

WHAT = ("tokens", "latents", "dino", "images")
_OF_LENGTHS = ("metric", "decoder_steps", "decoder_guidance")  # flags that need --quality
# Flags that --images has no use for.
_OF_SHARDS = ("what", "split", "num_images", "copies", "shards", "quality", *_OF_LENGTHS, "dtype")
_NOT_OF = {  # flags that the kinds of shards have no use for
  "tokens": ("dtype",),
  "latents": ("num_tokens", "quality", *_OF_LENGTHS),
  "dino": ("num_tokens", "quality", *_OF_LENGTHS, "checkpoint"),
  "images": ("num_tokens", "quality", *_OF_LENGTHS, "dtype", "checkpoint", "copies"),
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string(
    "checkpoint", None, "A tokenizer, or for latents a VAE: file, folder or hub repository.", flag_values=values
  )
  flags.DEFINE_list("images", None, "Image files and folders, separated by commas.", flag_values=values)
  flags.DEFINE_string("out", None, "File to write, .json or .npz; with --config a folder.", flag_values=values)
  flags.DEFINE_integer("num_tokens", None, "Tokens to write an image; default: all.", flag_values=values)
  flags.DEFINE_integer("batch_size", 32, "Images at once.", flag_values=values)
  cli.define_config_flag("For shards: a file whose data and seed say what to read.", values)
  flags.DEFINE_enum("what", "tokens", WHAT, "With --config: what the shards hold.", flag_values=values)
  flags.DEFINE_enum("split", "train", ("train", "validation"), "With --config: of the sources.", flag_values=values)
  flags.DEFINE_integer("num_images", None, "With --config: images; default: all of one source.", flag_values=values)
  flags.DEFINE_integer(
    "copies",
    1,
    "With --config: crops of each image, the first the centre crop, the others as in training.",
    flag_values=values,
  )
  flags.DEFINE_integer("shards", None, "With --config: files; default: one for about 4096 records.", flag_values=values)
  flags.DEFINE_float(
    "quality",
    None,
    "With --config: stores the length of the shortest prefix whose reconstruction is "
    "this near, in --metric; default: all tokens.",
    flag_values=values,
  )
  flags.DEFINE_string("metric", "mse", "With --quality: the distance.", flag_values=values)
  flags.DEFINE_integer(
    "decoder_steps",
    None,
    "With --quality: Euler steps of the decoder (one gives about the mean of "
    "all images of these tokens); default: the tokenizer's.",
    1,
    flag_values=values,
  )
  flags.DEFINE_enum(
    "decoder_guidance",
    None,
    guidance.MODES,
    "With --quality: of the reconstruction; default: the tokenizer's.",
    flag_values=values,
  )
  # float16 has 11 bits of mantissa to bfloat16's 8, and latents are far from its largest value, 65504.
  flags.DEFINE_enum("dtype", "float16", DTYPES, "Of latents and features.", flag_values=values)


def main(values: flags.FlagValues):
  """Tokenizes values.images, or the sources of values.config, into values.out."""
  needed = ["checkpoint"] if values.what in ("tokens", "latents") else []
  for name in (*needed, "images" if values.config is None else "config", "out"):
    if not values[name].value:
      raise ValueError(f"--{name} is missing" + (" (or --config, for shards)" if name == "images" else ""))
  if values.batch_size < 1:
    raise ValueError(f"--batch_size={values.batch_size} must be at least 1")
  if values.config is None:
    tokenize_files(values)
  else:
    write_shards(values)


def tokenize_files(values: flags.FlagValues):
  """Writes a token file of values.images."""
  for name in _OF_SHARDS:
    if values[name].present:
      raise ValueError(f"--{name} has no meaning for --images: it is for shards, of the sources of --config")
  out = Path(values.out)
  token_files.check_suffix("out", out)
  config, params, tokenize_fn, num_tokens = _load(values)
  images, names = transforms.load_images(values.images, config.image_size)
  token_ids = decoding.tokenize(tokenize_fn, params, images, values.batch_size)[:, :num_tokens]
  token_files.write_tokens(out, config.image_size, names, token_ids)
  print(f"wrote {out}: {len(names)} images of {config.image_size} px, {num_tokens} tokens each")


def write_shards(values: flags.FlagValues):
  """Writes the shards of values.config that belong to this process, on the devices of this process."""
  if values.images:
    raise ValueError("--images and --config are two ways to name images: give one of them")
  for name in _NOT_OF[values.what]:
    if values[name].present:
      raise ValueError(f"--{name} has no meaning for --what={values.what}")
  if Path(values.out).is_file():
    raise ValueError(f"--out={values.out} is a file: shards need a folder")
  mesh = jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,), devices=jax.local_devices())
  make = {"tokens": _tokens, "latents": _latents, "dino": _features, "images": _images}[values.what]
  shard_writer.write_shards(
    values.out,
    make(values, mesh),
    inputs.image_data(values.config),
    seed=values.config.seed,
    max_unreadable=values.config.data.max_unreadable,
    split=values.split,
    num_images=values.num_images,
    copies=values.copies,
    num_shards=values.shards,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def _batch_size(values: flags.FlagValues, mesh: jax.sharding.Mesh) -> int:
  """--batch_size, rounded up to a multiple of the devices."""
  return -(-values.batch_size // mesh.size) * mesh.size


def _tokens(values: flags.FlagValues, mesh: jax.sharding.Mesh) -> TokenRecords:
  config, params, tokenize_fn, num_tokens = _load(values)
  tokenizer = {
    "fingerprint": fingerprints.tokenizer(config, params),
    "dtype": config.dtype,
    "image_size": config.image_size,
    "num_ids": fsq.num_codes(config.tokens.levels),
    "num_tokens": num_tokens,
  }
  params = jax.device_put(params, sharding.replicated(mesh))
  lengths_fn = None
  if values.quality is not None:
    from flextok_jax.inference import adaptive  # late: only lengths need it

    with cli.renamed(**cli.DECODER_FLAGS):
      sampler = decoding.override_sampler(config.sampler, values.decoder_steps, values.decoder_guidance, None)
    config = with_fields(config, {f"sampler.{name}": value for name, value in sampler.items()})
    lengths_fn = adaptive.make_lengths_fn(config, params, values.quality, values.metric)
    tokenizer["sampler"] = config.sampler.to_dict()
  for name in _OF_LENGTHS:
    if values.quality is None and values[name].present:
      raise ValueError(f"--{name} needs --quality, the distance that will do")
  tokenize_fn = jax.jit(tokenize_fn)

  def encode(images):
    ids = tokenize_fn(params, images)[:, :num_tokens]
    return ids, lengths_fn and lengths_fn(images, ids)

  metric = None if lengths_fn is None else values.metric
  return TokenRecords(encode, tokenizer, _batch_size(values, mesh), values.quality, metric, mesh)


def _latents(values: flags.FlagValues, mesh: jax.sharding.Mesh) -> shard_files.ArrayRecords:
  config, params = loading.load(values.checkpoint)
  if "vae" not in params:
    raise ValueError(
      f"{values.checkpoint} is a model of stage {config.stage!r} without a VAE, so it has no latents to "
      "write: give a VAE, or a tokenizer that has one"
    )
  facts = {
    "fingerprint": fingerprints.vae(config, params),
    "compute_dtype": config.vae.dtype,
    "image_size": config.image_size,
    "dtype": values.dtype,
  }
  vae = make_vae(config)
  params = jax.device_put(params["vae"], sharding.replicated(mesh))

  @jax.jit
  def moments(params, images):
    moments = jnp.concatenate(vae.apply({"params": params}, to_float(images), method="encode"), axis=-1)
    return moments.astype(values.dtype)

  facts["shape"] = list(jax.eval_shape(moments, params, np.zeros((1, *[config.image_size] * 2, 3), np.uint8)).shape[1:])
  encode = functools.partial(moments, params)
  return shard_files.ArrayRecords(LatentShards, encode, facts, _batch_size(values, mesh), mesh)


def _features(values: flags.FlagValues, mesh: jax.sharding.Mesh) -> shard_files.ArrayRecords:
  config = values.config
  sizes, params = teacher.read(config)
  grid = repa.teacher_grid(config)
  facts = {
    "fingerprint": fingerprints.teacher(sizes, params),
    "teacher": config.repa.teacher,
    "compute_dtype": config.repa.dtype,
    "image_size": config.image_size,
    "shape": [grid**2, config.repa.features],
    "dtype": values.dtype,
  }
  features = teacher.make_features_fn(config, sizes, params, mesh)
  del params

  encode = lambda images: features(images).astype(values.dtype)
  return shard_files.ArrayRecords(FeatureShards, encode, facts, _batch_size(values, mesh), mesh)


def _images(values: flags.FlagValues, mesh: jax.sharding.Mesh) -> ImageRecords:
  return ImageRecords(_batch_size(values, mesh))


def _load(values: flags.FlagValues):
  """(config, params, tokenize_fn(params, images), number of its tokens to keep)."""
  config, params = loading.load(values.checkpoint)
  predict_fns = make_stage(config).predict_fns
  if "tokenize" not in predict_fns:
    raise ValueError(f"{values.checkpoint} is a model of stage {config.stage!r}, which has no tokens")
  registers = config.tokens.num_registers
  (num_tokens,) = decoding.token_counts((registers if values.num_tokens is None else values.num_tokens,), registers)
  slots = nested.padded_length(num_tokens - 1, registers)
  return config, params, functools.partial(predict_fns["tokenize"], num_tokens=slots), num_tokens


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
