"""Exports a model's function, with its weights, to one file that runs without this package: jax and numpy are enough.

python -m flextok_jax.export --checkpoint=PATH --what=tokenize|detokenize|generate --out=FILE.zip

The program takes any batch size, and runs on CPUs, NVIDIA GPUs and TPUs. about.json in the file describes its inputs
and outputs; docs/deploying.md has the ten lines that run it. Settings of the samplers are fixed by the flags here, by
default as the checkpoint's config has them.
"""

from absl import flags

from flextok_jax import cli
from flextok_jax.core import extras
from flextok_jax.inference.generator import load_ar
from flextok_jax.inference.tokenizer import FlexTok, load, with_positions, with_sampler
from flextok_jax.ops import guidance
from flextok_jax.tools import export

_SIZES = ("size", "posemb_scaling", "vae_tile")
_FLAGS = {  # by program, those of one or two programs alone
  "tokenize": (*_SIZES,),
  "detokenize": ("num_steps", "guidance", "guidance_scale", *_SIZES),
  "generate": ("guidance_scale", "temperature", "top_k", "top_p", "greedy", "setting"),
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string(
    "checkpoint", None, "A tokenizer, or a generator to generate: name, file, folder, repository.", flag_values=values
  )
  flags.DEFINE_enum("what", None, tuple(_FLAGS), "The function to export.", flag_values=values)
  flags.DEFINE_string("out", None, "The file to write, a .zip.", flag_values=values)
  flags.DEFINE_list("platforms", list(export.PLATFORMS), "Where the program is to run.", flag_values=values)
  flags.DEFINE_string("dtype", None, "float32 or bfloat16; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_integer("num_tokens", None, "Length of the sequences; default: the model's.", 1, flag_values=values)
  flags.DEFINE_integer("num_steps", None, "Euler steps of detokenize; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_enum("guidance", None, guidance.MODES, "Of detokenize; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_float(
    "guidance_scale", None, "Of detokenize or generate; 1: off; default: the checkpoint's.", flag_values=values
  )
  flags.DEFINE_float("temperature", None, "Of generate; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_integer("top_k", None, "Of generate; 0: off; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_float("top_p", None, "Of generate; 0: off; default: the checkpoint's.", flag_values=values)
  flags.DEFINE_bool("greedy", False, "Of generate: take the most likely token.", flag_values=values)
  cli.define_size_flags(values)
  cli.define_setting_flag(values)


def main(values: flags.FlagValues):
  """Exports values.what of values.checkpoint to values.out."""
  cli.require(values, "checkpoint", "what", "out")
  for name in sorted({name for names in _FLAGS.values() for name in names} - set(_FLAGS[values.what])):
    if values[name].present:
      raise ValueError(f"--{name} has no effect with --what={values.what}: leave it out")
  path = cli.new_file(values.out, "--out")
  extras.require("flatbuffers", "export", "a file of jax.export")
  given = {name: values[name].value for name in _FLAGS[values.what] if name not in ("setting", *_SIZES)}
  if values.what == "generate":
    gen = load_ar(values.checkpoint, values.dtype, **cli.parse_settings(values.setting))
    program = export.generate(gen, values.num_tokens, **given)
  elif values.what == "detokenize":
    model = with_positions(_load(values), values.posemb_scaling, ("decoder",))  # the encoder's identify the ids
    program = export.detokenize(with_sampler(model, **given), values.num_tokens, cli.parse_size(values))
  else:
    model = with_positions(_load(values), values.posemb_scaling)
    program = export.tokenize(model, values.num_tokens, cli.parse_size(values))
  about = export.write(path, program, values.platforms)
  for kind in ("inputs", "outputs"):
    for name, x in about[kind].items():
      shape = ", ".join(map(str, x["shape"]))
      print(f"{kind[:-1]:6} {name:14} {x['dtype']:8} [{shape}]: {x['description']}")
  print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, for {', '.join(about['platforms'])}")


def _load(values: flags.FlagValues) -> FlexTok:
  return load(values.checkpoint, values.dtype, vae_tile=values.vae_tile)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
