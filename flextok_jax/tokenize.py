"""Turns images into token ids, or into shards: of token ids, of a VAE's latents, of a teacher's features, or of files.

python -m flextok_jax.tokenize --checkpoint=PATH --images=FILE_OR_FOLDER[,...] --out=tokens.json [--num_tokens=K]
    [--resize=crop|fit|none --posemb_scaling=interpolate] [--quality=Q]
python -m flextok_jax.tokenize --checkpoint=PATH [--config=NAME] [--data=FOLDER] --out=DIR [--split=validation]
    [--num_images=N] [--copies=K] [--quality=Q]
python -m flextok_jax.tokenize --what=latents --checkpoint=PATH --config=NAME --out=DIR [--copies=K] [--dtype=bfloat16]
python -m flextok_jax.tokenize --what=trajectories --checkpoint=PATH --config=NAME --out=DIR [--copies=K]
    [--dtype=bfloat16] [--steps=1,2,4]
python -m flextok_jax.tokenize --what=dino --config=NAME --out=DIR [--copies=K] [--dtype=bfloat16]
python -m flextok_jax.tokenize --what=images --config=NAME --out=DIR

The first makes a token file, JSON or .npz (inference/token_files.py); bytes of a name that are not UTF-8 become \\xNN.
With --resize=fit or none the file says the size of each image; with --quality images have as many tokens as they need.
Files that cannot be read are left out, counted and named; beyond the share data.max_unreadable of the checkpoint's
config the command writes the others and exits with code 1. The other commands make shards of the sources of config.data
(data/shards): token ids for training stage "ar", latents for training stage "tokenizer" without the VAE's encoder,
features of the teacher of config.repa for its REPA beside them, paths of the decoder from noise to latents for training
stage "distill" without running its teacher, image files for fast reading (data.sources.arrayrecord). Killed and rerun,
they go on.
"""

from pathlib import Path

from absl import flags
import jax
from ml_collections import ConfigDict

from flextok_jax import cli
from flextok_jax.config import float_dtype, get_config
from flextok_jax.core import unreadable
from flextok_jax.data import transforms
from flextok_jax.data.shards import writer as shard_writer
from flextok_jax.data.shards.features import FeatureShards
from flextok_jax.data.shards.files import DTYPES, ArrayRecords, Records
from flextok_jax.data.shards.images import ImageRecords
from flextok_jax.data.shards.tokens import TokenRecords
from flextok_jax.inference import batches, image_files, shards, token_files
from flextok_jax.inference.tokenizer import FlexTok, load, load_tokenizer
from flextok_jax.ops import guidance
from flextok_jax.parallel import batching
from flextok_jax.stages import repa
from flextok_jax.training import inputs, teacher
from flextok_jax.weights import fingerprints, loading

WHAT = ("tokens", "latents", "dino", "images", "trajectories")
_OF_LENGTHS = ("metric", "decoder_steps", "decoder_guidance")  # flags that need --quality
# Flags that --images has no use for.
_OF_SHARDS = ("what", "split", "num_images", "copies", "shards", "dtype", "steps")
_OF_FILES = ("resize", "posemb_scaling", "vae_tile")
_NOT_OF = {  # flags that the kinds of shards have no use for
  "tokens": ("dtype", "steps", *_OF_FILES),
  "latents": ("num_tokens", "quality", *_OF_LENGTHS, "steps", *_OF_FILES),
  "dino": ("num_tokens", "quality", *_OF_LENGTHS, "checkpoint", "steps", *_OF_FILES),
  "images": ("num_tokens", "quality", *_OF_LENGTHS, "dtype", "checkpoint", "copies", "steps", *_OF_FILES),
  "trajectories": ("num_tokens", "quality", *_OF_LENGTHS, *_OF_FILES),
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string(
    "checkpoint", None, "A tokenizer, or for latents a VAE: file, folder or hub repository.", flag_values=values
  )
  flags.DEFINE_list("images", None, "Image files and folders, separated by commas.", flag_values=values)
  flags.DEFINE_string("out", None, "File to write, .json or .npz; with --config a folder.", flag_values=values)
  flags.DEFINE_integer("num_tokens", None, "Tokens to write an image; default: all.", flag_values=values)
  flags.DEFINE_integer("batch_size", 32, "Images per batch.", flag_values=values)
  cli.define_config_flag(
    "For shards: a config whose data and seed say what to read; default: that of the checkpoint, if it is a run's.",
    values,
  )
  cli.define_data_flag(values)
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
    "Keeps the shortest prefix whose reconstruction is this near, in --metric; shards store its length; default: all "
    "tokens.",
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
  flags.DEFINE_list(
    "steps",
    list(get_config().distill.steps),
    "Of trajectories: numbers of steps of the students to train.",
    flag_values=values,
  )
  cli.define_resize_flag(values, "Of --images. ")
  cli.define_posemb_flag(values)
  cli.define_tile_flag(values)
  # float16 has 11 bits of mantissa to bfloat16's 8, and latents are far from its largest value, 65504.
  flags.DEFINE_enum("dtype", "float16", DTYPES, "Of latents, features and trajectories.", flag_values=values)


def main(values: flags.FlagValues):
  """Tokenizes values.images, or the sources of a config, into values.out."""
  if values.what in ("tokens", "latents", "trajectories"):
    cli.require(values, "checkpoint")
  config = values.config
  if config is None and not values.images and values.checkpoint and loading.is_run(values.checkpoint):
    config = loading.load_config(values.checkpoint)  # the data that it was trained on
  if not values.images and config is None:
    raise ValueError("--images is missing (or --data or --config, for shards)")
  cli.require(values, "out")
  if config is None:
    tokenize_files(values)
  else:
    write_shards(values, cli.with_data(config, values))


def tokenize_files(values: flags.FlagValues):
  """Writes a token file of values.images."""
  for name in _OF_SHARDS:
    if values[name].present:
      raise ValueError(f"--{name} has no meaning for --images: it is for shards, of the sources of --config")
  token_files.check_suffix("out", Path(values.out))
  if jax.process_count() > 1:
    raise ValueError("--images runs in one process: set JAX_NUM_PROCESSES=1, or write shards of a --config")
  out = cli.new_file(values.out, "--out")
  named = transforms.name_images(values.images)
  model = _load(values)
  done = image_files.tokenize_files(
    model,
    named,
    out,
    values.num_tokens,
    values.batch_size,
    progress=None,
    resize=values.resize,
    quality=values.quality,
    metric=values.metric,
  )
  left_out = f"; {done.unreadable} of {len(named)} are left out, the first: {done.reason}" if done.unreadable else ""
  area = f"{model.image_size} x {model.image_size}"
  size = {"crop": f"{model.image_size} px", "fit": f"about {area} px", "none": "their own size"}[values.resize]
  count = f"{done.num_tokens} tokens each" if values.quality is None else f"up to {done.num_tokens} tokens"
  print(f"wrote {out}: {done.images} images of {size}, {count}{left_out}")
  share = model.config.data.max_unreadable
  unreadable.check(done.unreadable, len(named), share, example=done.reason, remedy=f"{out} has the others")


def write_shards(values: flags.FlagValues, config: ConfigDict):
  """Writes the shards of a config's sources that belong to this process, on the devices of this process."""
  if values.images:
    raise ValueError("--images and --config are two ways to name images: give one of them")
  for name in _NOT_OF[values.what]:
    if values[name].present:
      raise ValueError(f"--{name} has no meaning for --what={values.what}")
  inputs.check_sources(config)
  out = cli.out_folder(values)
  mesh = batches.local_mesh()
  make = {"tokens": _tokens, "latents": _latents, "trajectories": _trajectories, "dino": _features, "images": _images}[
    values.what
  ]
  shard_writer.write_shards(
    out,
    make(values, config, mesh),
    inputs.image_data(inputs.with_present_sources(config)),
    seed=config.seed,
    split=values.split,
    num_images=values.num_images,
    copies=values.copies,
    num_shards=values.shards,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def _load(values: flags.FlagValues) -> FlexTok:
  """Returns the tokenizer, whose sampler --quality uses."""
  for name in _OF_LENGTHS:
    if values.quality is None and values[name].present:
      raise ValueError(f"--{name} needs --quality, the largest acceptable distance")
  with cli.renamed(**cli.DECODER_FLAGS):
    return load_tokenizer(
      values.checkpoint,
      num_steps=values.decoder_steps,
      guidance=values.decoder_guidance,
      posemb_scaling=values.posemb_scaling,
      vae_tile=values.vae_tile,
    )


def _tokens(values: flags.FlagValues, config: ConfigDict, mesh: jax.sharding.Mesh) -> TokenRecords:
  return shards.tokens(
    _load(values),
    mesh,
    num_tokens=values.num_tokens,
    batch_size=values.batch_size,
    quality=values.quality,
    metric=values.metric,
  )


def _latents(values: flags.FlagValues, config: ConfigDict, mesh: jax.sharding.Mesh) -> ArrayRecords:
  model = load(values.checkpoint)
  return shards.latents(model, mesh, dtype=values.dtype, batch_size=values.batch_size)


def _trajectories(values: flags.FlagValues, config: ConfigDict, mesh: jax.sharding.Mesh) -> Records:
  if config.data.shapes:
    raise ValueError("--what=trajectories writes paths of one shape: set --config.data.shapes=()")
  steps = cli.numbers("steps", values.steps, int)
  options = dict(steps=steps, seed=config.seed, dtype=values.dtype, batch_size=values.batch_size)
  return shards.trajectories(load_tokenizer(values.checkpoint), mesh, **options)


def _features(values: flags.FlagValues, config: ConfigDict, mesh: jax.sharding.Mesh) -> ArrayRecords:
  sizes, params = teacher.read_teacher(config.repa.teacher, config.repa.features)
  facts = {
    "fingerprint": fingerprints.teacher(sizes, params),
    "teacher": config.repa.teacher,
    "compute_dtype": config.repa.dtype,
    "image_size": config.image_size,
    "shape": [repa.teacher_grid(config) ** 2, config.repa.features],
    "dtype": values.dtype,
  }
  options = dict(
    grid=repa.teacher_grid(config),
    dtype=float_dtype("repa.dtype", config.repa.dtype),
    image_size=config.image_size,
    attention=config.attention,
  )
  features = teacher.make_features_fn(sizes, params, mesh, **options)
  del params

  encode = lambda images: features(images).astype(values.dtype)
  size = batching.batch_rows(values.batch_size, values.batch_size, mesh)
  return ArrayRecords(FeatureShards, encode, facts, size, mesh)


def _images(values: flags.FlagValues, config: ConfigDict, mesh: jax.sharding.Mesh) -> ImageRecords:
  return ImageRecords(batching.batch_rows(values.batch_size, values.batch_size, mesh))


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
