"""Shows a tokenizer and a generator in the browser: pictures as ordered tokens, drawing token by token, search.

python -m flextok_jax.demo [--checkpoint=TOKENIZER] [--generator=GENERATOR] [--port=7860]
    [--size=HEIGHT,WIDTH --posemb_scaling=interpolate]

Without these flags it shows the models of emoji that ship. A tokenizer without --generator has one tab: drop a
picture, see its tokens, decode any number of them, edit and swap them. A generator adds two: drawing and searching.

Needs the extra "demo" (gradio). The page loads nothing from the network and listens on this machine alone, unless
--host or --share says otherwise. Uploads are limited, kept in a temporary folder, and deleted at the end.
"""

import functools

from absl import flags

from flextok_jax import cli
from flextok_jax.core import extras
from flextok_jax.inference.generator import load_ar
from flextok_jax.inference.tokenizer import load_tokenizer

TOKENIZER, GENERATOR = "glyphs_student", "glyphs_text"  # that ship


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  string("checkpoint", None, f"A tokenizer: name, file, folder, workdir or hub repository; default: {TOKENIZER}.")
  string("generator", None, f"A generator of its tokens; default: {GENERATOR}, or none for another tokenizer.")
  cli.define_setting_flag(values)
  cli.define_size_flags(values)
  integer("decoder_steps", None, "Euler steps of the tokenizer's decoder; default: the tokenizer's.", 1)
  string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's.")
  integer("port", 7860, "Port to listen on.", 1, 65535)
  flags.DEFINE_bool("share", False, "Get a public address from gradio's servers.", flag_values=values)


def main(values: flags.FlagValues):
  """Serves the page until the process is stopped."""
  extras.require("gradio", "demo", "the demo")
  from flextok_jax.tools.demo import model, server  # late: imports gradio

  server.check_port(values.host, values.port)
  generator = values.generator or (None if values.checkpoint else GENERATOR)
  with cli.renamed(**cli.DECODER_FLAGS):
    tokenizer = load_tokenizer(values.checkpoint or TOKENIZER, num_steps=values.decoder_steps, vae_tile=values.vae_tile)
  gen = load_ar(generator, **cli.parse_settings(values.setting)) if generator else None
  models = model.Models(tokenizer, gen, cli.parse_size(values), values.posemb_scaling)
  models.warm_up(functools.partial(print, flush=True))
  server.run(models, values.host, values.port, values.share)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
