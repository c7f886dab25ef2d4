"""Models in Hugging Face's format, in a folder or on the hub: config.json and one or several safetensors files.

Nothing that a file names is imported or called, and an index can only name files in its own folder.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import os
import re

import numpy as np

from flextok_jax.core import hub, literals
from flextok_jax.core.tensor_file import TensorFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NEEDED = f"{hub.CONFIG} and {WEIGHTS} (or {INDEX} and the files that it names)"  # in a folder, for errors
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors", re.ASCII)


class Folder:
  """The files of a model.

  Args:
    source: a folder, or a repository of the hub.
    kind: of the model, for errors.
    example: a repository with such a model, for errors.

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
    """Returns the path of the first of the named files that exists."""
    if not self._local:
      return hub.fetch_file(self.name, *names, needed=NEEDED)
    for name in names:
      path = os.path.join(self.name, name)
      if os.path.isfile(path):
        return path
    others = [name for name in sorted(os.listdir(self.name)) if name.endswith((".bin", ".pt", ".h5", ".msgpack"))]
    instead = f", and {others[0]} is not supported: save the model as safetensors" if others else ""
    raise FileNotFoundError(f"folder {self.name} lacks {' and '.join(names)}{instead}; needed are {NEEDED}")

  def read_json(self, path: str) -> dict:
    """Returns the JSON object in a file."""
    try:
      with open(path, "rb") as f:
        return literals.parse_json(f.read(literals.MAX_TEXT + 1), path)
    except OSError as e:
      raise ValueError(f"{path} cannot be read: {e.strerror}") from None

  def tensors(self, ignored: tuple[str, ...] = ()) -> "Tensors":
    """Returns all tensors by their names, without those whose names begin with one of `ignored`, whatever their type.

    Only files with tensors that are asked for are downloaded and opened.
    """
    path = self.find(WEIGHTS, INDEX)
    if os.path.basename(path) == WEIGHTS:
      file = TensorFile(path, ignored)
      return Tensors(file.shapes, lambda name: file)
    weight_map = self.read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError(f"{path} has no weight_map: not an index of safetensors files")
    for name, shard in weight_map.items():
      if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
        raise ValueError(
          f"{path}: tensor {name!r:.80} is in {literals.quote(shard)}, which is not the plain name of a "
          ".safetensors file"
        )
    shards = {name: shard for name, shard in weight_map.items() if not name.startswith(ignored)}
    open_shard = functools.cache(lambda shard: TensorFile(self.find(shard), ignored))
    return Tensors(shards, lambda name: open_shard(shards[name]))


class Tensors(Mapping[str, np.ndarray]):
  """Tensors by their names; each is read whenever it is asked for.

  Args:
    names: of the tensors.
    file_of: from a name to the file that holds the tensor.
  """

  def __init__(self, names: Iterable[str], file_of: Callable[[str], TensorFile]):
    self._names, self._file_of = dict.fromkeys(names), file_of

  def _file(self, name: str) -> TensorFile:
    if name not in self._names:
      raise KeyError(name)
    file = self._file_of(name)
    if name not in file.shapes:
      raise ValueError(f"{file.path} lacks the tensor {name!r:.80}, which the index says it has")
    return file

  def __getitem__(self, name: str) -> np.ndarray:
    return self._file(name).read(name)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._file(name).shapes[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)
