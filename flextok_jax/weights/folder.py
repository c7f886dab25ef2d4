"""Models in Hugging Face's format, in a folder or on the hub: config.json and safetensors, whole or in shards.

Nothing that a file names is imported or called, and an index names files of its own folder alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import os
import re

import numpy as np

from flextok_jax.core import hub, literals
from flextok_jax.core.tensor_file import TensorFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NEEDED = f"{hub.CONFIG} and {WEIGHTS} (or {INDEX} and the files that it names)"  # of a folder, in errors
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors", re.ASCII)


class Folder:
  """The files of a model.

  Args:
    source: a folder, or a repository of the hub.
    kind: what the model is, for errors.
    example: a repository of that kind, for errors.

  Raises:
    FileNotFoundError: neither a folder nor the name of a repository.
  """

  def __init__(self, source: str | os.PathLike, kind: str, example: str):
    self.name = os.fspath(source)
    self._local = os.path.isdir(self.name)
    if not self._local and not hub.is_repository(self.name):
      raise FileNotFoundError(
        f"no such {kind}: {self.name}; give a folder or a repository on Hugging Face, such as {example}"
      )

  def find(self, *names: str) -> str:
    """Returns the path of the first of the files that is there."""
    if not self._local:
      return hub.fetch_file(self.name, *names, needed=NEEDED)
    for name in names:
      path = os.path.join(self.name, name)
      if os.path.isfile(path):
        return path
    others = [name for name in sorted(os.listdir(self.name)) if name.endswith((".bin", ".pt", ".h5", ".msgpack"))]
    instead = f", and {others[0]} is not read: save the model as safetensors" if others else ""
    raise FileNotFoundError(f"folder {self.name} lacks {' and '.join(names)}{instead}; needed are {NEEDED}")

  def read_json(self, path: str) -> dict:
    try:
      with open(path, "rb") as f:
        return literals.parse_json(f.read(literals.MAX_TEXT + 1), path)
    except OSError as e:
      raise ValueError(f"{path} cannot be read: {e.strerror}") from None

  def tensors(self, ignored: tuple[str, ...] = ()) -> tuple[Iterable[str], Callable[[str], TensorFile]]:
    """Returns the names of all tensors, and a function from such a name to the file that holds it.

    Tensors whose names begin with one of `ignored` are left out, whatever their type.
    """
    path = self.find(WEIGHTS, INDEX)
    if os.path.basename(path) == WEIGHTS:
      file = TensorFile(path, ignored)
      return file.shapes, lambda name: file
    places = self.read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
      raise ValueError(f"{path} has no weight_map: not an index of safetensors files")
    for name, place in places.items():
      if not isinstance(place, str) or not _SHARD.fullmatch(place):
        raise ValueError(
          f"{path}: tensor {name!r:.80} is in {literals.quote(place)}, which is not the plain name of a "
          ".safetensors file"
        )
    places = {name: place for name, place in places.items() if not name.startswith(ignored)}
    files = {}  # of those that are needed; a decoder's alone are neither downloaded nor opened

    def open_file(name: str) -> TensorFile:
      place = places[name]
      if place not in files:
        files[place] = TensorFile(self.find(place), ignored)
      return files[place]

    return places, open_file

  def arrays(self, ignored: tuple[str, ...] = ()) -> "Arrays":
    """Returns the tensors by their names, each read when it is asked for; see tensors."""
    return Arrays(*self.tensors(ignored))


class Arrays(Mapping):
  """Tensors by their names, read anew whenever they are asked for."""

  def __init__(self, names: Iterable[str], open_file: Callable[[str], TensorFile]):
    self._names, self._open_file = dict.fromkeys(names), open_file

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._names:
      raise KeyError(name)
    file = self._open_file(name)
    if name not in file.shapes:
      raise ValueError(f"{file.path} lacks the tensor {name!r:.80}, which the index says it has")
    return file.read(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)
