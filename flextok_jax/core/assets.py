"""The models that ship with the package, by name."""

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "assets"
_NETWORKS = ("scenes",)  # of verifiers; not models


def names() -> list[str]:
  """Returns the names of the models, such as "glyphs"."""
  return sorted(path.stem for path in FOLDER.glob("*.safetensors") if path.stem not in _NETWORKS)


def resolve(source: str) -> str:
  """Returns the path of a model that is given by its name, unless a file or folder has that name; else the source."""
  return str(FOLDER / f"{source}.safetensors") if not os.path.lexists(source) and source in names() else source
