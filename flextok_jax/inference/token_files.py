"""Token files: JSON or .npz with the token ids of many images, as the commands exchange them.

JSON holds {"tokenizer": fingerprint, "image_size": pixels, "num_tokens": K, "names": [n], "token_ids": [n][at most K]},
of which only "token_ids" is required; an .npz holds the same as arrays (without pickled objects). Images that were not
cropped to image_size x image_size also have "sizes": [n][2], the height and width of each in pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import json
import os
from pathlib import Path
import zipfile

import numpy as np

from flextok_jax.config.ranges import MAX_SIDE
from flextok_jax.core import files, npz
from flextok_jax.core.literals import quote
from flextok_jax.inference import decoding

SUFFIXES = (".json", ".npz")
MAX_JSON = 2**28  # bytes of a JSON token file, which takes up to thirty times as much memory when it is read
Ids = Sequence[int] | np.ndarray
Size = tuple[int, int]  # (height, width) in pixels


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a token file says of all its entries.

  Attributes:
    tokenizer: fingerprint of the tokenizer of the ids; "": unknown.
    image_size: in pixels.
    num_tokens: most ids of an image.
  """

  tokenizer: str
  image_size: int
  num_tokens: int


def check_suffix(name: str, path: Path) -> None:
  """Raises ValueError, naming the argument `name`, if a path does not end as token files do."""
  if path.suffix not in SUFFIXES:
    raise ValueError(f"{name}={path} must end in {' or '.join(SUFFIXES)}")


def check_json_size(path: Path, names: Iterable[str], num_tokens: int, num_codes: int, sized: bool = False) -> None:
  """Raises ValueError if a token file with num_tokens ids below num_codes for each name may be too large for JSON."""
  lengths = [len(json.dumps(name)) for name in names] if path.suffix == ".json" else []
  size = sum(lengths) + len(lengths) * (num_tokens * (len(str(num_codes)) + 2) + 6 + 14 * sized)
  if size > MAX_JSON:
    raise ValueError(
      f"out={path} would have up to {size} bytes, and a JSON token file has at most {MAX_JSON}: write FILE.npz"
    )


def write_tokens(
  path: Path, facts: Facts, entries: Iterable[tuple[str, Ids]], sizes: Iterable[Size] | None = None
) -> None:
  """Writes a token file atomically, one entry at a time.

  Args:
    path: of the file.
    facts: what the file says of all entries.
    entries: (name, ids) of each image, num_tokens ids in an .npz file, else at most; iterated several times.
    sizes: of each image; None: all are image_size x image_size.
  """
  files.clear_leftovers(path.parent, [path.name])
  with files.replacing(path) as temporary:
    if path.suffix == ".npz":
      _write_npz(temporary, facts, entries, sizes)
    else:
      with open(temporary, "wb") as file:
        for part in _json_parts(facts, entries, sizes):
          file.write(part)


def to_json(facts: Facts, entries: Iterable[tuple[str, Ids]], sizes: Iterable[Size] | None = None) -> bytes:
  """Returns the content of a JSON token file; arguments as of write_tokens."""
  return b"".join(_json_parts(facts, entries, sizes))


def _json_parts(facts: Facts, entries: Iterable[tuple[str, Ids]], sizes: Iterable[Size] | None) -> Iterator[bytes]:
  yield json.dumps(dataclasses.asdict(facts)).encode().removesuffix(b"}") + b', "names": ['
  for i, (name, _) in enumerate(entries):
    yield b", " * (i > 0) + json.dumps(name).encode()
  if sizes is not None:
    yield b'], "sizes": ['
    for i, size in enumerate(sizes):
      yield b", " * (i > 0) + json.dumps([int(side) for side in size]).encode()
  yield b'], "token_ids": ['
  for i, (_, ids) in enumerate(entries):
    yield b", " * (i > 0) + json.dumps([int(token) for token in ids]).encode()
  yield b"]}\n"


def _write_npz(path: Path, facts: Facts, entries: Iterable[tuple[str, Ids]], sizes: Iterable[Size] | None) -> None:
  lengths = [len(name) for name, _ in entries]
  count, text = len(lengths), np.dtype(("<U", max(1, *lengths, 1)))
  with zipfile.ZipFile(path, "w") as archive:

    def write(name: str, dtype: np.dtype, shape: tuple[int, ...], rows: Iterable) -> None:
      with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
          file.write(np.asarray(row, dtype).tobytes())

    write("tokenizer", np.dtype(("<U", max(1, len(facts.tokenizer)))), (), [facts.tokenizer])
    write("image_size", np.dtype("<i8"), (), [facts.image_size])
    write("num_tokens", np.dtype("<i8"), (), [facts.num_tokens])
    write("names", text, (count,), (name for name, _ in entries))
    if sizes is not None:
      write("sizes", np.dtype("<i4"), (count, 2), sizes)
    write("token_ids", np.dtype("<i4"), (count, facts.num_tokens), (ids for _, ids in entries))


def read_tokens(
  path: Path, facts: Facts, num_codes: int, also: str = ""
) -> tuple[list[str], list[Ids], list[Size] | None]:
  """Reads and checks a token file.

  Args:
    path: of the file.
    facts: of the tokenizer that is to decode it; num_tokens: its registers.
    num_codes: of that tokenizer.
    also: another fingerprint of a tokenizer whose ids it decodes: the same with its own positions.

  Returns:
    (names, token ids, sizes): one entry per image, each of 1 to num_tokens ids in [0, num_codes); its name can be part
    of a file's name, see file_stem; sizes of sides from 1 to MAX_SIDE, or None if the file has none.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged file, or tokens that do not fit the model.
  """
  check_suffix("tokens", path)
  if not path.is_file():
    raise FileNotFoundError(f"no token file at {path}")
  found, size, names, sequences, sizes = (_read_npz if path.suffix == ".npz" else _read_json)(path)
  if size is not None and size != facts.image_size:
    raise ValueError(
      f"{path} holds tokens of {quote(size)} px images, but this checkpoint makes {facts.image_size} px images: use "
      "the checkpoint that wrote them"
    )
  if found and facts.tokenizer and found not in (facts.tokenizer, also):
    raise ValueError(
      f"{path} holds ids of the tokenizer {quote(found)}, but this checkpoint is {facts.tokenizer}: use the checkpoint "
      "that wrote them, with the same posemb_scaling"
    )
  if len(names) != len(sequences):
    raise ValueError(f"{path} has {len(names)} names for {len(sequences)} token sequences")
  for i, name in enumerate(names):
    if not _can_be_in_a_path(name):
      raise ValueError(f"{path}: names[{i}] is {quote(name)}, which cannot be part of a file's name: correct it")
  for i, sequence in enumerate(sequences):
    if not 1 <= len(sequence) <= facts.num_tokens:
      raise ValueError(f"{path}: token_ids[{i}] has {len(sequence)} tokens, this model takes 1 to {facts.num_tokens}")
    if isinstance(sequence, np.ndarray) and sequence.min() >= 0 and sequence.max() < num_codes:
      continue
    for j, token in enumerate(sequence.tolist() if isinstance(sequence, np.ndarray) else sequence):
      if type(token) is not int or not 0 <= token < num_codes:  # not isinstance: True is an int
        raise ValueError(f"{path}: token_ids[{i}][{j}] is {quote(token)}, this model's ids are 0 to {num_codes - 1}")
  return names, sequences, None if sizes is None else _checked_sizes(path, sizes, len(sequences))


def _checked_sizes(path: Path, sizes: object, count: int) -> list[Size]:
  if not isinstance(sizes, list) or len(sizes) != count:
    raise ValueError(f"{path}: 'sizes' must be a list of [height, width], one for each of {count} token sequences")
  for i, size in enumerate(sizes):
    sides = size if isinstance(size, list) and len(size) == 2 else [None]
    if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
      raise ValueError(f"{path}: sizes[{i}] is {quote(size)}, not [height, width] of 1 to {MAX_SIDE} pixels")
  return [(height, width) for height, width in sizes]


def file_stem(name: str) -> str:
  """Returns the part of an image's name that the file of its reconstruction has: without folders and suffix, cut."""
  return files.shorten(Path(name).stem)


def _can_be_in_a_path(name: str) -> bool:
  try:
    return b"\0" not in os.fsencode(name)
  except UnicodeEncodeError:  # a lone surrogate that stands for no byte
    return False


def _read_json(path: Path) -> tuple[object, object, list[str], list[Ids], object]:
  """Returns (fingerprint of the tokenizer or None, image_size or None, names, token ids, sizes or None)."""
  size = path.stat().st_size
  if size > MAX_JSON:
    raise ValueError(f"{path} has {size} bytes, and a JSON token file has at most {MAX_JSON}: write it as .npz")
  try:
    fields = json.loads(path.read_bytes())
  except Exception as e:  # json raises several types for a damaged file
    raise ValueError(f"{path} is not a complete .json token file ({type(e).__name__}): write it again") from e
  if not isinstance(fields, dict):
    raise ValueError(f"{path} must hold an object with 'token_ids', not a {type(fields).__name__}")
  if "token_ids" not in fields:
    raise ValueError(f"{path} has no 'token_ids'")
  sequences = fields["token_ids"]
  if not isinstance(sequences, list) or not sequences or not all(isinstance(s, list) for s in sequences):
    raise ValueError(f"{path}: 'token_ids' must be a list of one or more lists of ids")
  names = fields.get("names", [str(i) for i in range(len(sequences))])
  if not isinstance(names, list):
    raise ValueError(f"{path}: 'names' must be a list of strings, not {quote(names)}")
  for i, name in enumerate(names):
    if not isinstance(name, str):
      raise ValueError(f"{path}: 'names' must be a list of strings, but names[{i}] is {quote(name)}")
  return fields.get("tokenizer"), fields.get("image_size"), names, sequences, fields.get("sizes")


def _read_npz(path: Path) -> tuple[object, object, list[str], list[Ids], object]:
  """Returns (fingerprint of the tokenizer or None, image_size or None, names, token ids, sizes or None)."""
  with npz.opened(path) as archive:
    found = npz.names(archive)
    if "token_ids" not in found:
      raise ValueError("it has no 'token_ids'")
    with npz.open_array(archive, "token_ids") as stream:
      shape = npz.header(archive, "token_ids", stream)[0]
    if len(shape) != 2 or not 0 < shape[0] <= path.stat().st_size:  # compressed, rows of nothing take few bytes
      raise ValueError(f"token_ids has shape {list(shape)}, which must be [images, tokens]")
    names = [str(i) for i in range(shape[0])]
    if "names" in found:
      array = npz.read(archive, "names", "U")
      if array.shape != shape[:1]:
        raise ValueError(f"there are {list(array.shape)} names for {shape[0]} token sequences")
      names = array.tolist()
    size = npz.read(archive, "image_size", "iu").item() if "image_size" in found else None
    tokenizer = npz.read(archive, "tokenizer", "U").item() if "tokenizer" in found else None
    sizes = npz.read(archive, "sizes", "iu").tolist() if "sizes" in found else None
    return tokenizer, size, names, list(npz.read(archive, "token_ids", "iu")), sizes


def cut(sequences: list[Ids], num_tokens: int | None, num_registers: int) -> list[Ids]:
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
