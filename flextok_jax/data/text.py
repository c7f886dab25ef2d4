"""Captions to token ids: tokenizer(captions: list of str) -> (ids int32 [n, max_length], lengths int32 [n]).

Every caption ends with an end token, before which long captions are cut; the empty caption is the end token alone. The
rest of a row is zeros.
"""

from collections.abc import Iterator, Sequence
import contextlib
import os
from typing import Any

import numpy as np

from flextok_jax.core import extras, hub
from flextok_jax.core.errors import first_line

FILES = ("tokenizer.json", "spiece.model")  # of a T5, the preferred one first
_END = 256  # of bytes
_MAX_VOCAB = 2**22  # ids of a tokenizer.json
_T5_END = 1


def make_tokenizer(encoder: str, max_length: int, path: str = "") -> "ByteTokenizer | T5Tokenizer":
  """Returns a tokenizer; its vocab_size is the number of ids.

  Args:
    encoder: "t5" or "bytes".
    max_length: ids per caption at most, with the end token.
    path: of "t5": a folder with one of FILES, or a repository on Hugging Face.

  Raises:
    FileNotFoundError: the files of the T5 tokenizer, or the package that reads them, are missing.
    ValueError: an unknown encoder, max_length below 1, or a file that is damaged or of another tokenizer.
  """
  if not isinstance(max_length, int) or max_length < 1:
    raise ValueError(f"max_length={max_length!r} of captions must be at least 1")
  if encoder == "bytes":
    return ByteTokenizer(max_length)
  if encoder == "t5":
    remedy = (
      f"set text.path to a folder with {' or '.join(FILES)} or a Hugging Face repository, such as google/flan-t5-xl"
    )
    return T5Tokenizer(_find(path, FILES, remedy), max_length)
  raise ValueError(f"unknown text encoder {encoder!r}: use 't5' or 'bytes'")


class ByteTokenizer:
  """The bytes of UTF-8; 256 is the end token. Captions are cut between characters."""

  vocab_size = _END + 1

  def __init__(self, max_length: int):
    self._max_length = max_length

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    for caption in captions:
      data = caption.encode(errors="replace")  # lone surrogates
      rows.append(list(data[: self._max_length - 1].decode(errors="ignore").encode()))
    return _pad(rows, _END, self._max_length)


class T5Tokenizer:
  """T5's tokens, from tokenizer.json (package tokenizers) or spiece.model (sentencepiece); </s> is 1, padding 0."""

  def __init__(self, path: str, max_length: int):
    self._max_length = max_length
    self._fast = os.path.basename(path) == FILES[0]
    loaded = _load_tokenizers(path, "</s>", "<pad>") if self._fast else _load_sentencepiece(path)
    self._model, self.vocab_size, end, padding = loaded
    if (end, padding) != (_T5_END, 0):
      raise ValueError(
        f"{path} is not the tokenizer of a T5, whose </s> is {_T5_END} and <pad> 0: here they are {end} and {padding}"
      )

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    if self._fast:
      rows = _encode(self._model, captions)
    else:
      rows = self._model.encode(_without_surrogates(captions), out_type=int)
    return _pad(rows, _T5_END, self._max_length)


class CLIPTokenizer:
  """CLIP's tokens, from tokenizer.json in a folder or a Hugging Face repository; captions also have a start token."""

  def __init__(self, source: str, max_length: int = 77):
    remedy = f"give a folder with {FILES[0]} or a Hugging Face repository, such as openai/clip-vit-base-patch32"
    path = _find(source, FILES[:1], remedy)
    self._max_length = max_length
    self._model, self.vocab_size, self._end, self._start = _load_tokenizers(path, "<|endoftext|>", "<|startoftext|>")
    if None in (self._end, self._start):
      raise ValueError(f"{path} is not the tokenizer of a CLIP: it has no <|startoftext|> or no <|endoftext|>")

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = [[self._start, *ids] for ids in _encode(self._model, captions)]
    return _pad(rows, self._end, self._max_length)


def _pad(rows: Sequence[list[int]], end: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Cuts rows of ids to max_length - 1, appends the end token, and pads with zeros."""
  ids = np.zeros((len(rows), max_length), np.int32)
  lengths = np.zeros(len(rows), np.int32)
  for i, row in enumerate(rows):
    row = [*row[: max_length - 1], end]
    ids[i, : len(row)] = row
    lengths[i] = len(row)
  return ids, lengths


def _find(source: str, files: Sequence[str], remedy: str) -> str:
  """Returns the path of a tokenizer's file in a folder or a Hugging Face repository."""
  needed = " or ".join(files)
  if os.path.isdir(source):
    for name in files:
      if os.path.isfile(os.path.join(source, name)):
        return os.path.join(source, name)
    raise FileNotFoundError(f"folder {source} has no tokenizer: {needed} is needed")
  if hub.is_repository(source):
    return hub.fetch_file(source, *files, needed=needed)
  raise FileNotFoundError(f"no such folder: {source!r}; {remedy}")


def _load_tokenizers(path: str, *tokens: str) -> tuple[Any, ...]:
  """Returns (model, number of ids, id or None of each of the tokens)."""
  tokenizers = extras.require("tokenizers", "text", path)
  with _failures(f"{path} is not a complete tokenizer of the tokenizers package"):
    model = tokenizers.Tokenizer.from_file(path)
    model.no_truncation()  # _pad cuts and pads
    model.no_padding()
    size = max(model.get_vocab().values(), default=-1) + 1
    ids = [model.token_to_id(token) for token in tokens]
  if size > _MAX_VOCAB:
    raise ValueError(f"{path} has a token with the id {size - 1}: at most {_MAX_VOCAB - 1} is read")
  return model, size, *ids


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
  """Turns whatever the tokenizers package raises into a ValueError; panics of its Rust code are no Exceptions."""
  try:
    yield
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as e:
    raise ValueError(f"{what} ({first_line(str(e) or type(e).__name__, 160)})") from None


def _encode(model: Any, captions: Sequence[str]) -> list[list[int]]:
  """Returns the ids of captions by a model of the tokenizers package, without special tokens."""
  with _failures("the tokenizer cannot encode these captions, as its tokenizer.json is damaged"):
    return [e.ids for e in model.encode_batch(_without_surrogates(captions), add_special_tokens=False)]


def _without_surrogates(captions: Sequence[str]) -> list[str]:
  """Returns captions with "?" in place of lone surrogates, which UTF-8 and so the packages cannot express."""
  return [caption.encode(errors="replace").decode() for caption in captions]


def _load_sentencepiece(path: str) -> tuple[Any, ...]:
  """Returns (model, number of ids, id of </s>, id of <pad>)."""
  sentencepiece = extras.require("sentencepiece", "text", path)
  model = sentencepiece.SentencePieceProcessor()
  try:
    with open(path, "rb") as f:
      model.LoadFromSerializedProto(f.read())
  except (OSError, RuntimeError) as e:
    raise ValueError(f"{path} is not a complete sentencepiece model ({first_line(e, 160)})") from None
  return model, model.get_piece_size(), model.eos_id(), model.pad_id()
