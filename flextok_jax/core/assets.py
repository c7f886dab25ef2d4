"""What ships with the package: models, by name, and pictures."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parents[1] / "assets"
CAPTIONS = "captions"  # the text of a sheet of pictures that has a list of their captions, as JSON
SIDE = 64  # height and width of its pictures
_NETWORKS = ("scenes",)  # of verifiers; not models


def names() -> list[str]:
  """Returns the names of the models, such as "glyphs"."""
  return sorted(path.stem for path in FOLDER.glob("*.safetensors") if path.stem not in _NETWORKS)


def resolve(source: str) -> str:
  """Returns the path of a model that is given by its name, unless a file or folder has that name; else the source."""
  return str(FOLDER / f"{source}.safetensors") if not os.path.lexists(source) and source in names() else source


def pictures() -> list[tuple[np.ndarray, str]]:
  """Returns emoji that were held out from training, uint8 [SIDE, SIDE, 3], and their captions."""
  sheet = Image.open(FOLDER / "held_out.png")
  rows, columns = sheet.height // SIDE, sheet.width // SIDE
  # [rows * SIDE, columns * SIDE, 3] -> [rows, columns, SIDE, SIDE, 3]
  cut = np.asarray(sheet.convert("RGB")).reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2)
  return list(zip(cut.reshape(-1, SIDE, SIDE, 3), json.loads(sheet.info[CAPTIONS])))
