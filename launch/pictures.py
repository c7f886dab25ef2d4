"""Pictures for launch/quickstart.sh.

python launch/pictures.py digits OUT                      # handwritten digits, OUT/DIGIT/NUMBER.png
python launch/pictures.py held_out OUT                    # the held-out emoji that ship with the package
python launch/pictures.py sheet OUT.png TITLE=PICTURE ... # pictures on one sheet, each under its title
"""

from pathlib import Path
import sys

import numpy as np
from PIL import Image
from sklearn import datasets

from flextok_jax.core import assets, files
from flextok_jax.evals import grids

COLUMNS = 3  # of a sheet
WIDTH = 700  # pixels of a picture on a sheet, at most


def digits(out: str):
  """Writes the 1,797 digits of scikit-learn, enlarged from 8 to 16 pixels a side."""
  found = datasets.load_digits()
  for number, (image, digit) in enumerate(zip(found.images, found.target)):
    folder = Path(out) / str(digit)
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.round(image * 255 / 16).astype(np.uint8))  # values up to 16
    picture.resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")


def held_out(out: str):
  """Writes the held-out emoji that ship with the package, OUT/NUMBER.png."""
  Path(out).mkdir(parents=True, exist_ok=True)
  for number, (picture, _) in enumerate(assets.pictures()):
    Image.fromarray(picture).save(Path(out) / f"{number:02d}.png")


def sheet(out: str, *titled: str):
  """Writes a sheet of pictures, each in the column that is the shortest so far."""
  columns: list[dict[str, Image.Image]] = [{} for _ in range(min(COLUMNS, len(titled)))]
  for title, _, path in (entry.rpartition("=") for entry in titled):
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((WIDTH, 10 * WIDTH))
    min(columns, key=lambda column: sum(p.height for p in column.values()))[title] = picture
  files.write_file(Path(out), grids.to_png(grids.beside([grids.below(column) for column in columns])))


if __name__ == "__main__":
  {"digits": digits, "held_out": held_out, "sheet": sheet}[sys.argv[1]](*sys.argv[2:])
