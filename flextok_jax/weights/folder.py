"""Models in the format of Hugging Face and diffusers, in a folder or on the hub: config.json and safetensors files.

Nothing that a file names is imported or called, and an index can only name files in its own folder.
"""

import functools
import os
import re

from flextok_jax.core import hub, literals, tensor_file
from flextok_jax.core.tensor_file import TensorFile, Tensors

_INDEX = ".index"
NAMES = tuple(  # of weights, or of the index of several files of them; the preferred one first
  name
  for variant in ("", ".fp16", ".bf16")
  for weights in (x.removesuffix(".safetensors") for x in hub.WEIGHTS)
  for name in (f"{weights}{variant}.safetensors", f"{weights}.safetensors.index{variant}.json")
)
_NEEDED = f"{hub.WEIGHTS[0]} (of a VAE {hub.WEIGHTS[1]}), or its .index.json and the files it names"  # for errors
_PYTORCH = (".bin", ".pt", ".pth", ".ckpt")
_OTHERS = (".h5", ".msgpack", ".gguf", ".onnx")
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors", re.ASCII)


class Folder:
  """The files of a model.

  Args:
    source: a folder, or a repository of the hub.
    kind: of the model, for errors.
    example: a repository with such a model, for errors.
    inside: folder within the source.
    config: name of the configuration, for errors.
    revision: branch, tag or commit of a repository; None: the main branch.

  Raises:
    FileNotFoundError: neither a folder nor the name of a repository.
  """

  def __init__(
    self,
    source: str | os.PathLike,
    kind: str,
    example: str,
    inside: str = "",
    config: str = hub.CONFIG,
    revision: str | None = None,
  ):
    self.name = os.fspath(source)
    self._inside, self._needed, self._revision = inside, f"{config} and {_NEEDED}", revision
    self._local = os.path.isdir(self.name)
    if not self._local and not hub.is_repository(self.name):
      raise FileNotFoundError(
        f"no such {kind}: {self.name}; give a folder or a repository on Hugging Face, such as {example}"
      )

  def find(self, *names: str) -> str:
    """Returns the path of the first of the named files that exists."""
    names = tuple(f"{self._inside}/{name}" if self._inside else name for name in names)
    if not self._local:
      return hub.fetch_file(self.name, *names, needed=self._needed, revision=self._revision)
    for name in names:
      path = os.path.join(self.name, name)
      if os.path.isfile(path):
        return path
    lacking = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other names of weights"
    raise FileNotFoundError(
      f"folder {self.name} lacks {lacking}{describe_others(self.name)}; needed are {self._needed}"
    )

  def read_json(self, path: str) -> dict:
    """Returns the JSON object in a file."""
    try:
      with open(path, "rb") as f:
        return literals.parse_json(f.read(literals.MAX_TEXT + 1), path)
    except OSError as e:
      raise ValueError(f"{path} cannot be read: {e.strerror}") from None

  def tensors(self, ignored: tuple[str, ...] = ()) -> Tensors:
    """Returns all tensors by their names, without those whose names begin with one of `ignored`, whatever their type.

    Only files with tensors that are asked for are downloaded and opened.
    """
    path = self.find(*NAMES)
    if not path.endswith(".json"):
      return TensorFile(path, ignored)
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
    with tensor_file.named(path):
      return tensor_file.Shards(path, shards, functools.cache(lambda shard: TensorFile(self.find(shard), ignored)))


def has_weights(folder: str) -> bool:
  """Whether a folder holds one of NAMES."""
  return any(os.path.isfile(os.path.join(folder, name)) for name in NAMES)


def describe_others(folder: str) -> str:
  """Returns what a folder holds instead of weights that are read, and what to do, for errors; "" if nothing."""
  names = sorted(os.listdir(folder))
  for name in (name for name in names if os.path.isfile(os.path.join(folder, name))):
    if name.endswith(_PYTORCH):
      return f", and {name} is not supported, as a pickled file can run code: {tensor_file.CONVERT}"
    if name.endswith(_OTHERS):
      return f", and {name} is not supported: save the model as safetensors"
  models = [name for name in names if os.path.isfile(os.path.join(folder, name, hub.CONFIG))]
  return f", but has folders of models: give one of {', '.join(models)[:160]}" if models else ""
