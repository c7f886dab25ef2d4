"""Draws held-out glyphs on one sheet without gaps, with their captions: flextok_jax/assets/held_out.png.

python -m experiments.glyphs.sheet --glyphs=DIR --out=FILE.png [--columns=8] [--rows=6]

DIR is the folder of experiments/glyphs/prepare.py. The glyphs are the first of the evaluation set of --config=glyphs
that are not flags, of which it has many. flextok_jax.core.assets.pictures reads the sheet.
"""

import io
import json
from pathlib import Path

from absl import flags
import numpy as np
from PIL import Image, PngImagePlugin

from flextok_jax import cli
from flextok_jax.config import with_fields
from flextok_jax.configs import glyphs
from flextok_jax.core import assets, files
from flextok_jax.data import pipeline
from flextok_jax.data.sources import code_points
from flextok_jax.training import inputs


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("glyphs", None, "Folder of glyphs in several styles.", flag_values=values)
  flags.DEFINE_string("out", None, "Picture to write, .png.", flag_values=values)
  flags.DEFINE_integer("columns", 8, "Glyphs in a row.", 1, flag_values=values)
  flags.DEFINE_integer("rows", 6, "Rows.", 1, flag_values=values)


def main(values: flags.FlagValues):
  """Writes the sheet."""
  cli.require(values, "glyphs", "out")
  config = with_fields(glyphs.get_config(), {"data.sources.emoji.path": values.glyphs})
  count = values.columns * values.rows
  data, size = inputs.image_data(config), config.image_size
  found = pipeline.eval_set(data, "emoji", image_size=size, num_images=2 * count)
  shown = np.flatnonzero(found["label"] != code_points.CLASS_NAMES.index("flag"))[:count]
  images = found["image"][shown]
  # [rows * columns, size, size, 3] -> [rows * size, columns * size, 3]
  sheet = images.reshape(values.rows, values.columns, size, size, 3).transpose(0, 2, 1, 3, 4)
  sheet = np.ascontiguousarray(sheet.reshape(values.rows * size, values.columns * size, 3))
  captions = PngImagePlugin.PngInfo()
  captions.add_text(assets.CAPTIONS, json.dumps([found["caption"][i] for i in shown]))
  png = io.BytesIO()
  Image.fromarray(sheet).save(png, "PNG", optimize=True, pnginfo=captions)
  files.write_file(Path(values.out), png.getvalue())


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
