"""Captions to token ids: tokenizer(captions: list of str) -> (ids int32 [n, max_length], lengths int32 [n]).

Every caption ends with an end token, the empty one is that alone; a longer one is cut before it. Behind it is padding,
zeros.
"""

from collections.abc import Sequence
import os

import numpy as np

from flextok_jax.core import hub

FILES = ("tokenizer.json", "spiece.model")  # of a T5, the better one first
_END = 256  # of bytes
_T5_END = 1


def make_tokenizer(cfg_text):
  """Returns the tokenizer of config.text; its vocab_size is the number of ids it knows.

  Raises:
    FileNotFoundError: the T5 tokenizer's files are not there, or the package that reads them.
    ValueError: an unknown encoder, a bad length, or a damaged or foreign file.
  """
  if not isinstance(cfg_text.max_length, int) or cfg_text.max_length < 1:
    raise ValueError(f"config.text.max_length must be at least 1, got {cfg_text.max_length!r}")
  if cfg_text.encoder == "bytes":
    return ByteTokenizer(cfg_text.max_length)
  if cfg_text.encoder == "t5":
    path = _find(
      cfg_text.path,
      FILES,
      f"give config.text.path a folder with {' or '.join(FILES)} or a repository on "
      "Hugging Face, such as google/flan-t5-xl",
    )
    return T5Tokenizer(path, cfg_text.max_length)
  raise ValueError(f"unknown config.text.encoder {cfg_text.encoder!r}: use 't5' or 'bytes'")


class ByteTokenizer:
  """The bytes of UTF-8, and 256 at the end. A caption is cut between characters, not within one."""

  vocab_size = _END + 1

  def __init__(self, max_length: int):
    self._max_length = max_length

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    for caption in captions:
      data = caption.encode(errors="replace")  # lone surrogates
      rows.append(list(data[: self._max_length - 1].decode(errors="ignore").encode()))
    return _pack(rows, _END, self._max_length)


class T5Tokenizer:
  """T5's tokens, from tokenizer.json (by tokenizers) or spiece.model (by sentencepiece); </s> is 1, padding 0."""

  def __init__(self, path: str, max_length: int):
    self._max_length = max_length
    self._fast = os.path.basename(path) == FILES[0]
    read = _read_tokenizers(path, "</s>", "<pad>") if self._fast else _read_sentencepiece(path)
    self._model, self.vocab_size, end, padding = read
    if (end, padding) != (_T5_END, 0):
      raise ValueError(
        f"{path} is not the tokenizer of a T5: there </s> is {_T5_END} and <pad> 0, here {end} and {padding}"
      )

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    if self._fast:
      rows = [e.ids for e in self._model.encode_batch(list(captions), add_special_tokens=False)]
    else:
      rows = self._model.encode(list(captions), out_type=int)
    return _pack(rows, _T5_END, self._max_length)


class CLIPTokenizer:
  """CLIP's tokens, from the tokenizer.json of a folder or a repository of the hub; a caption has a start, too."""

  def __init__(self, source: str, max_length: int = 77):
    path = _find(
      source,
      FILES[:1],
      f"give a folder with {FILES[0]} or a repository on Hugging Face, such as openai/clip-vit-base-patch32",
    )
    self._max_length = max_length
    self._model, self.vocab_size, self._end, self._start = _read_tokenizers(path, "<|endoftext|>", "<|startoftext|>")
    if None in (self._end, self._start):
      raise ValueError(f"{path} is not the tokenizer of a CLIP: it lacks <|startoftext|> or <|endoftext|>")

  def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = [[self._start, *e.ids] for e in self._model.encode_batch(list(captions), add_special_tokens=False)]
    return _pack(rows, self._end, self._max_length)


def _pack(rows: Sequence[list[int]], end: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Cuts rows of ids to max_length - 1, ends and pads them."""
  ids = np.zeros((len(rows), max_length), np.int32)
  lengths = np.zeros(len(rows), np.int32)
  for i, row in enumerate(rows):
    row = [*row[: max_length - 1], end]
    ids[i, : len(row)] = row
    lengths[i] = len(row)
  return ids, lengths


def _find(source: str, files: Sequence[str], remedy: str) -> str:
  """Returns the path of the tokenizer's file in a folder or a repository of the hub."""
  needed = " or ".join(files)
  if os.path.isdir(source):
    for name in files:
      if os.path.isfile(os.path.join(source, name)):
        return os.path.join(source, name)
    raise FileNotFoundError(f"folder {source} holds no tokenizer: {needed} is needed")
  if hub.is_repository(source):
    return hub.fetch_file(source, *files, needed=needed)
  raise FileNotFoundError(f"no such folder: {source!r}; {remedy}")


def _read_tokenizers(path: str, *tokens: str) -> tuple:
  """Returns (model, number of ids, id of each of the tokens or None)."""
  try:
    import tokenizers  # late, as sentencepiece below: few need them
  except ImportError:
    raise _missing(path, "tokenizers") from None
  try:
    model = tokenizers.Tokenizer.from_file(path)
  except Exception as e:  # it raises nothing more special
    raise ValueError(f"{path} is not a whole tokenizer of the tokenizers package ({_first_line(e)})") from None
  model.no_truncation()  # as ours cuts and pads
  model.no_padding()
  return model, model.get_vocab_size(), *map(model.token_to_id, tokens)


def _read_sentencepiece(path: str) -> tuple:
  """Returns (model, number of ids, id of </s>, id of <pad>)."""
  try:
    import sentencepiece
  except ImportError:
    raise _missing(path, "sentencepiece") from None
  model = sentencepiece.SentencePieceProcessor()
  try:
    with open(path, "rb") as f:
      model.LoadFromSerializedProto(f.read())
  except (OSError, RuntimeError) as e:
    raise ValueError(f"{path} is not a whole sentencepiece model ({_first_line(e)})") from None
  return model, model.get_piece_size(), model.eos_id(), model.pad_id()


def _missing(path: str, package: str) -> FileNotFoundError:
  return FileNotFoundError(f"{path} cannot be read without {package}: pip install {package}")


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:160]
