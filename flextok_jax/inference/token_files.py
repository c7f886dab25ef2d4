"""Token files: JSON or .npz with the token ids of many images, as the commands exchange them.

JSON holds {"image_size": pixels, "num_tokens": K, "names": [n], "token_ids": [n][at most K]}, of which only "token_ids"
is required; an .npz holds the same four arrays (without pickled objects).
"""

from collections.abc import Sequence
import io
import json
from pathlib import Path

import numpy as np

from flextok_jax.core import files
from flextok_jax.inference import decoding

SUFFIXES = (".json", ".npz")


def check_suffix(name: str, path: Path) -> None:
  """Raises ValueError, naming the argument `name`, if a path does not end as token files do."""
  if path.suffix not in SUFFIXES:
    raise ValueError(f"{name}={path} must end in {' or '.join(SUFFIXES)}")


def write_tokens(path: Path, image_size: int, names: Sequence[str], token_ids: np.ndarray) -> None:
  """Writes a token file atomically: token_ids int32 [n, k], one name per image."""
  num_tokens = token_ids.shape[1]
  if path.suffix == ".npz":
    texts, ids = np.asarray(names, np.str_), token_ids.astype(np.int32)
    buffer = io.BytesIO()
    np.savez(buffer, image_size=image_size, num_tokens=num_tokens, names=texts, token_ids=ids)
    content = buffer.getvalue()
  else:
    content = to_json(image_size, num_tokens, names, token_ids.tolist())
  files.write_file(path, content)


def to_json(image_size: int, num_tokens: int, names: Sequence[str], token_ids: Sequence[Sequence[int]]) -> bytes:
  """Returns the content of a JSON token file."""
  fields = {"image_size": image_size, "num_tokens": num_tokens, "names": list(names), "token_ids": token_ids}
  return (json.dumps(fields) + "\n").encode()


def read_tokens(path: Path, image_size: int, num_registers: int, num_codes: int) -> tuple[list[str], list[list[int]]]:
  """Reads and checks a token file.

  Args:
    image_size, num_registers, num_codes: of the tokenizer that is to decode it.

  Returns:
    (names, token ids): one entry per image, each of 1 to num_registers ids in [0, num_codes).

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged file, or tokens that do not fit the model.
  """
  fields = _read_fields(path)
  if "token_ids" not in fields:
    raise ValueError(f"{path} has no 'token_ids'")
  sequences = fields["token_ids"]
  if not isinstance(sequences, list) or not sequences or not all(isinstance(s, list) for s in sequences):
    raise ValueError(f"{path}: 'token_ids' must be a list of one or more lists of ids")
  if fields.get("image_size", image_size) != image_size:
    raise ValueError(
      f"{path} holds tokens of {fields['image_size']} px images, but this checkpoint makes"
      f" {image_size} px images: use the checkpoint that wrote them"
    )
  names = fields.get("names", [str(i) for i in range(len(sequences))])
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError(f"{path}: 'names' must be a list of strings")
  if len(names) != len(sequences):
    raise ValueError(f"{path} has {len(names)} names for {len(sequences)} token sequences")
  for i, sequence in enumerate(sequences):
    if not 1 <= len(sequence) <= num_registers:
      raise ValueError(f"{path}: token_ids[{i}] has {len(sequence)} tokens, this model takes 1 to {num_registers}")
    for j, token in enumerate(sequence):
      if type(token) is not int or not 0 <= token < num_codes:  # not isinstance: True is an int
        raise ValueError(f"{path}: token_ids[{i}][{j}] is {token!r}, this model's ids are 0 to {num_codes - 1}")
  return names, sequences


def _read_fields(path: Path) -> dict:
  """Returns the content of a token file as plain Python values."""
  check_suffix("tokens", path)
  if not path.is_file():
    raise FileNotFoundError(f"no token file at {path}")
  try:
    if path.suffix == ".json":
      fields = json.loads(path.read_bytes())
    else:
      with np.load(path, allow_pickle=False) as arrays:
        fields = {name: arrays[name].tolist() for name in arrays.files}
  except Exception as e:  # json, zipfile, zlib and numpy raise many types for a damaged file
    raise ValueError(f"{path} is not a complete {path.suffix} token file ({type(e).__name__}): write it again") from e
  if not isinstance(fields, dict):
    raise ValueError(f"{path} must hold an object with 'token_ids', not a {type(fields).__name__}")
  return fields


def cut(sequences: list[list[int]], num_tokens: int | None, num_registers: int) -> list[list[int]]:
  """Returns the first num_tokens of each sequence; None keeps all.

  Raises:
    ValueError: num_tokens is out of range, or a sequence is shorter.
  """
  if num_tokens is None:
    return sequences
  decoding.token_counts((num_tokens,), num_registers)
  for i, sequence in enumerate(sequences):
    if len(sequence) < num_tokens:
      raise ValueError(f"num_tokens={num_tokens}, but token_ids[{i}] has only {len(sequence)} tokens")
  return [sequence[:num_tokens] for sequence in sequences]
