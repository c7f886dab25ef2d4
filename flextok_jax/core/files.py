"""Reading of text files and of files found in folders, names in messages, and atomic writes."""

import codecs
import os
from pathlib import Path
import stat

MAX_TEXT_BYTES = 2**26  # of a text file
_BOMS = {  # of other encodings than UTF-8; UTF-32's begins with UTF-16's
  codecs.BOM_UTF32_LE: "UTF-32",
  codecs.BOM_UTF32_BE: "UTF-32",
  codecs.BOM_UTF16_LE: "UTF-16",
  codecs.BOM_UTF16_BE: "UTF-16",
}
_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}


def printable(path: str | os.PathLike) -> str:
  """Returns a path for messages: on one line, with escapes in place of bytes that are not UTF-8 and of control codes."""
  text = os.fspath(path)
  # Python has the byte 0xe9 of a name as the lone surrogate U+DCE9.
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode().replace("\\udc", "\\x") for c in text)


def check_regular(path: str | os.PathLike):
  """Raises an OSError unless a path, found in a folder, leads to a regular file: reading a FIFO or a device can hang."""
  mode = os.stat(path).st_mode
  if not stat.S_ISREG(mode):
    raise OSError(f"is a {_KINDS.get(stat.S_IFMT(mode), 'device')}, not a regular file")


def read_text(path: str | os.PathLike, limit: int = MAX_TEXT_BYTES, name: str = "") -> str:
  """Returns the text of a UTF-8 file without its byte order mark. Text files of users are read by this function.

  Args:
    path: of the file.
    limit: bytes at most.
    name: what messages call the file; "": by its path.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it cannot be read, is in another encoding or has more bytes.
  """
  name = name or f"the file {printable(path)}"
  try:
    with open(path, "rb") as f:
      data = f.read(limit + 1)
  except FileNotFoundError:
    raise FileNotFoundError(f"{name} does not exist") from None
  except OSError as e:
    raise ValueError(f"{name} cannot be read: {e.strerror}") from None
  try:
    return decode_text(data, limit)
  except ValueError as e:
    raise ValueError(f"{name} {e}") from None


def decode_text(data: bytes, limit: int = MAX_TEXT_BYTES) -> str:
  """Returns the text of the bytes of a UTF-8 file, see read_text; the message of its ValueError lacks the file."""
  if len(data) > limit:
    raise ValueError(f"has more than {limit} bytes: text files are at most that long")
  for mark, encoding in _BOMS.items():
    if data.startswith(mark):
      raise ValueError(f"is text in {encoding}: save it as UTF-8")
  if b"\0" in data:
    raise ValueError("is no text in UTF-8, as it has a zero byte: save it as UTF-8 if it is UTF-16, else leave it out")
  try:
    return data.decode("utf-8").replace("\ufeff", "")  # a file joined from several has several marks
  except UnicodeDecodeError as e:
    line, byte = data.count(b"\n", 0, e.start) + 1, data[e.start]
    hint = "save it as UTF-8 (it may be in Windows-1252 or Latin-1)"
    raise ValueError(f"is no text in UTF-8, as line {line} has the byte 0x{byte:02x}: {hint}") from None


def lines(text: str) -> list[str]:
  """Splits a text at \\n and \\r\\n alone: str.splitlines also splits at U+2028 and others, inside a sentence."""
  return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def write_file(path: Path, data: bytes):
  """Writes a file atomically: to a temporary name in the same folder, which is then renamed.

  Raises:
    ValueError: the path cannot be written.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(data)
    os.replace(temporary, path)
  except OSError as e:
    if temporary.is_file():
      temporary.unlink()
    raise ValueError(f"cannot write {path}: {e.strerror}") from e
