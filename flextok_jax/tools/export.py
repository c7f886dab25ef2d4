"""Programs that run without this package: a model's function with its weights in one file, by jax.export.

The file is a zip archive without compression, which numpy.load reads:

- about.json: what the program does, its inputs and outputs, the settings that are fixed in it, and the weights' names;
- program.bin: jax.export's serialised program (StableHLO) for each platform, its batch size left open;
- weights/NAME.npy: the arrays that it reads. They are not constants of the program: jax.export cannot serialise more
  than 2 GiB, and XLA compiles large constants slowly.

The program takes the weights and the inputs, two dictionaries by name, and returns a dictionary of outputs. It computes
attention by XLA's own operations, as the kernels of cuDNN and Pallas run on one platform. Row i of the outputs depends
on row i of the inputs alone: its random numbers come from its own seed.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any
import zipfile

import jax
from jax import export
from jax.interpreters import partial_eval
import jax.numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np

import flextok_jax
from flextok_jax.config import TOKENIZER_STAGES, with_fields
from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.inference import drawing, programs, tokenizer
from flextok_jax.inference.generator import ARGenerator
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.inference.validation import token_count, whole_number
from flextok_jax.models.ar.sampling import TokenSampler

PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT = 1  # of the file
BATCH = "b"  # the name of the batch size in shapes
_SEEDS = "seeds of the random numbers: row i has those of jax.random.fold_in(jax.random.key(seeds[i]), 0)"


@dataclasses.dataclass(frozen=True)
class Input:
  """An argument of a program."""

  dtype: Any
  shape: tuple[int | str, ...]  # BATCH: the batch size
  description: str


@dataclasses.dataclass(frozen=True)
class Program:
  """A function of a model, to be exported.

  Attributes:
    name: "tokenize", "detokenize" or "generate".
    model: a FlexTok or an ARGenerator.
    function: (the model, inputs by name) -> outputs by name.
    inputs: by name.
    outputs: what they are, by name.
    settings: what is fixed in the program; JSON-serialisable.
  """

  name: str
  model: Any
  function: Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]
  inputs: Mapping[str, Input]
  outputs: Mapping[str, str]
  settings: Mapping[str, Any]


def tokenize(model: FlexTok, num_tokens: int | None = None, size: tuple[int, int] | None = None) -> Program:
  """Returns the program of FlexTok.tokenize.

  Args:
    model: a tokenizer.
    num_tokens: how many of the first tokens it returns; default: all.
    size: (height, width) of the images; default: the model's image_size.

  Raises:
    ValueError: a number of tokens or a size that the model does not have, or a VAE alone.
  """
  count, (height, width) = _count(model, num_tokens), size or (model.image_size, model.image_size)
  jax.eval_shape(model.tokenize, jax.ShapeDtypeStruct((1, height, width, 3), np.uint8))  # raises for a bad size

  def function(model, inputs):
    return {"ids": tokenizer.encode_ids(model, inputs["images"], count)}

  inputs = {"images": Input(np.uint8, (BATCH, height, width, 3), "RGB images")}
  outputs = {"ids": f"token ids, 0 to {model.num_codes - 1}"}
  settings = _tokenizer_settings(model, count, (height, width))
  return Program("tokenize", model, function, inputs, outputs, settings)


def detokenize(model: FlexTok, num_tokens: int | None = None, size: tuple[int, int] | None = None) -> Program:
  """Returns the program of FlexTok.detokenize, by the sampler of the model's config.

  Args:
    model: a tokenizer.
    num_tokens: length of the sequences that it takes; default: all tokens. Fewer take less time.
    size: (height, width) of the images; default: the model's image_size.

  Raises:
    ValueError: a number of tokens or a size that the model does not have, a bad setting of the sampler, or a VAE alone.
  """
  count, size = _count(model, num_tokens), size or (model.image_size, model.image_size)
  slots, shape = programs.slots(model, count), model.latent_shape_of(size)
  settings = _tokenizer_settings(model, count, size) | {"sampler": model.config.sampler.to_dict()}

  def function(model, inputs):
    ids = jnp.pad(inputs["ids"], ((0, 0), (0, slots - count)))
    noise = programs.sample_noise(_keys(inputs["seeds"]), shape)
    images = tokenizer.decode_ids(model, ids, inputs["keep_k"], noise)
    return {"images": images_lib.as_uint8(images)}

  inputs = {
    "ids": Input(np.int32, (BATCH, count), f"token ids, 0 to {model.num_codes - 1}; from keep_k on without effect"),
    "keep_k": Input(np.int32, (BATCH,), f"how many of the first ids to use, 1 to {count}"),
    "seeds": Input(np.uint32, (BATCH,), _SEEDS),
  }
  return Program("detokenize", model, function, inputs, {"images": "RGB images"}, settings)


def generate(model: ARGenerator, num_tokens: int | None = None, **choices: Any) -> Program:
  """Returns the program of ARGenerator.generate.

  Captions are given as bytes where the model has its own text encoder, else as features of the encoder that it was
  trained with.

  Args:
    model: a generator.
    num_tokens: length of the sequences; default: the model's.
    **choices: guidance_scale, temperature, top_k, top_p and greedy, as for ARGenerator.generate.

  Raises:
    ValueError: a number of tokens that the model does not draw, or a choice out of range.
  """
  config = model.config
  count = whole_number("num_tokens", model.num_tokens if num_tokens is None else num_tokens, 1, model.num_tokens)
  sampler = model.token_sampler(config.ar.condition != "none", **choices)
  inputs = {"seeds": Input(np.uint32, (BATCH,), _SEEDS)}
  settings: dict[str, Any] = {"tokenizer": config.ar.tokenizer, "num_tokens": count, "num_codes": model.num_ids}
  settings |= {"stop_id": model.stop_id, "condition": config.ar.condition, "sampler": _choices(sampler)}
  bytewise = config.ar.condition == "text" and config.text.encoder == "bytes"
  longest = config.text.max_length
  if config.ar.condition == "class":
    settings["class_names"] = list(model.class_names)
    inputs["labels"] = Input(np.int32, (BATCH,), f"classes, 0 to {model.num_classes - 1}; -1: none")
  elif bytewise:
    caption = "captions: bytes of UTF-8, then 256, then zeros; the empty caption is 256 alone"
    inputs["text_ids"] = Input(np.int32, (BATCH, longest), caption)
    inputs["text_lengths"] = Input(np.int32, (BATCH,), f"ids of each caption, the 256 included: 1 to {longest}")
  elif config.ar.condition == "text":
    width, what = config.text.features, f"of the {config.text.encoder} encoder, of {config.text.path}"
    valid = f"positions of each that count, 1 to {longest}"
    inputs["text_features"] = Input(np.float32, (BATCH, longest, width), f"features of captions, {what}")
    inputs["text_lengths"] = Input(np.int32, (BATCH,), valid)
    if sampler.guidance_scale is not None:
      inputs["null_features"] = Input(np.float32, (1, longest, width), f"features of the empty caption, {what}")
      inputs["null_lengths"] = Input(np.int32, (1,), valid)

  def function(model, inputs):
    seeds = inputs["seeds"]
    labels = inputs.get("labels", jnp.full(seeds.shape, -1, jnp.int32))
    text = null_text = None
    if "text_features" in inputs:
      text = inputs["text_features"], inputs["text_lengths"]
      null_text = (inputs["null_features"], inputs["null_lengths"]) if "null_features" in inputs else None
    elif bytewise:
      lengths = inputs["text_lengths"]
      text = drawing.encode_text_ids(model, inputs["text_ids"], lengths), lengths
      null_text = model.encode_text([""])
    ids = drawing.draw_ids(model, _keys(seeds), labels, text, null_text, count, sampler)
    return {"ids": ids, "lengths": (ids != model.num_ids).sum(1, dtype=jnp.int32)}

  outputs = {
    "ids": f"token ids, 0 to {model.num_ids - 1}; {model.num_ids} after the end of a sequence",
    "lengths": "ids of each sequence before its end",
  }
  return Program("generate", model, function, inputs, outputs, settings)


def write(path: Path, program: Program, platforms: Sequence[str] = PLATFORMS) -> dict[str, Any]:
  """Exports a program and writes its file.

  Args:
    path: of the file; one that exists is replaced.
    program: of tokenize, detokenize or generate.
    platforms: of PLATFORMS, those that the file can run on.

  Returns:
    The contents of about.json.

  Raises:
    ValueError: an unknown platform, or the file cannot be written.
  """
  unknown = [name for name in platforms if name not in PLATFORMS]
  if unknown or not platforms:
    raise ValueError(f"platforms={','.join(platforms)}: give some of {','.join(PLATFORMS)}")
  portable = FrozenConfigDict(with_fields(program.model.config, {"attention": "xla"}))
  model = dataclasses.replace(program.model, config=portable)
  leaves = jax.tree_util.tree_leaves_with_path(model)
  arrays = {f"weights/{jax.tree_util.keystr(path, simple=True, separator='.')}": x for path, x in leaves}
  names, structure = list(arrays), jax.tree.structure(model)

  def run(weights: Mapping[str, jax.Array], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return program.function(jax.tree.unflatten(structure, map(weights.get, names)), inputs)

  # Weights that no output depends on, such as the decoder's for tokenize, are left out.
  (batch,) = export.symbolic_shape(BATCH)
  inputs = {
    name: jax.ShapeDtypeStruct([batch if size == BATCH else size for size in item.shape], item.dtype)
    for name, item in program.inputs.items()
  }
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
  traced = jax.make_jaxpr(run)(shapes, inputs).jaxpr
  used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))[1]
  kept = sorted(name for name, is_used in zip(sorted(names), used) if is_used)  # dictionaries are flattened in order
  exported = export.export(jax.jit(run), platforms=platforms)({name: shapes[name] for name in kept}, inputs)

  outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
  about = {
    "format": FORMAT,
    "program": program.name,
    "inputs": {name: _entry(inputs[name], item.description) for name, item in program.inputs.items()},
    "outputs": {name: _entry(x, program.outputs[name]) for name, x in outputs.items()},
    "settings": dict(program.settings),
    "platforms": list(platforms),
    "versions": {"flextok_jax": flextok_jax.__version__, "jax": jax.__version__},
    "weights": {name: _entry(arrays[name]) for name in kept},
  }
  with files.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
    archive.writestr("about.json", json.dumps(about, indent=1) + "\n")
    archive.writestr("program.bin", bytes(exported.serialize()))
    for name in kept:
      with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(arrays[name]), allow_pickle=False)
  return about


def _entry(x: Any, description: str = "") -> dict[str, Any]:
  """Returns type and shape of an array, and what it is, for about.json."""
  shape = [size if isinstance(size, int) else str(size) for size in x.shape]
  return {"dtype": str(x.dtype), "shape": shape} | ({"description": description} if description else {})


def _keys(seeds: jax.Array) -> jax.Array:
  """Returns one key for each seed [b]: that of sample 0 of a batch drawn with the seed."""
  return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(seeds)


def _count(model: FlexTok, num_tokens: int | None) -> int:
  if model.config.stage not in TOKENIZER_STAGES:
    raise ValueError(f"this is a model of stage {model.config.stage!r}: it has latents, but no tokens")
  return token_count(num_tokens, model.num_registers)


def _tokenizer_settings(model: FlexTok, num_tokens: int, size: tuple[int, int]) -> dict[str, Any]:
  sizes = {"image_size": model.image_size, "size": list(size), "num_tokens": num_tokens, "num_codes": model.num_codes}
  return {"tokenizer": model.fingerprint, **sizes}


def _choices(sampler: TokenSampler) -> dict[str, Any]:
  """Returns how tokens are drawn, for about.json; null: off."""
  return {
    name: value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    for name, value in dataclasses.asdict(sampler).items()
  }
