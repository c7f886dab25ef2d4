"""Reading of text files and of files found in folders, names of files, atomic writes, and locks."""

import codecs
from collections.abc import Callable, Iterable, Iterator
import contextlib
import fcntl
import os
from pathlib import Path
import re
import secrets
import stat
from typing import BinaryIO

MAX_NAME = 200  # bytes of a name from elsewhere that becomes part of a file's name: file systems take 255
_TEMPORARY = re.compile(r"\.(.*)\.[0-9a-f]{8}\.tmp", re.DOTALL)
MAX_TEXT_BYTES = 2**26  # of a text file
_BOMS = {  # of other encodings than UTF-8; UTF-32's begins with UTF-16's
  codecs.BOM_UTF32_LE: "UTF-32",
  codecs.BOM_UTF32_BE: "UTF-32",
  codecs.BOM_UTF16_LE: "UTF-16",
  codecs.BOM_UTF16_BE: "UTF-16",
}
_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}


def printable(path: str | os.PathLike) -> str:
  """Returns a path for messages: on one line, with escapes for bytes that are not UTF-8 and for control codes."""
  text = os.fspath(path)
  # Python has the byte 0xe9 of a name as the lone surrogate U+DCE9.
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode().replace("\\udc", "\\x") for c in text)


def check_regular(path: str | os.PathLike):
  """Raises an OSError unless a path found in a folder leads to a regular file: reading a FIFO or a device can hang."""
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
  """Writes a file atomically, see `replacing`."""
  with replacing(path) as temporary:
    temporary.write_bytes(data)


def write_new_file(path: Path, data: bytes):
  """As write_file, but keeps a file that is there already, even one that another run makes at the same moment."""
  with _publishing(path, _link) as temporary:
    temporary.write_bytes(data)


def replacing(path: Path) -> contextlib.AbstractContextManager[Path]:
  """Makes a new, empty file in the same folder, which replaces `path` when the body of the with statement ends.

  No other run uses this file: its name is random, and it is locked until then (see clear_leftovers).

  Returns:
    A context manager of the new file's path.

  Raises:
    ValueError: the path cannot be written; an OSError of the body counts as that.
  """
  return _publishing(path, os.replace)


def check_writable(folder: Path):
  """Raises ValueError if no file can be written into a folder, or into the lowest folder above it that exists."""
  existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
  if not existing.is_dir():
    raise ValueError(f"cannot write {folder}: {existing} is a file")
  try:
    with _publishing(existing / "file", lambda temporary, path: None) as temporary:
      temporary.write_bytes(b"x")
  except ValueError as e:
    raise ValueError(f"cannot write {folder}: {str(e).rpartition(': ')[2]}") from None


def _link(temporary: Path, path: Path):
  try:
    os.link(temporary, path)
  except FileExistsError:
    pass
  except OSError:  # no hard links on this file system
    if not path.exists():
      os.replace(temporary, path)


@contextlib.contextmanager
def _publishing(path: Path, publish: Callable[[Path, Path], None]) -> Iterator[Path]:
  temporary = path.with_name(f".{shorten(path.name)}.{secrets.token_hex(4)}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(temporary, "xb") as file:
        lock(file)
        yield temporary
        publish(temporary, path)
    finally:
      with contextlib.suppress(OSError):
        temporary.unlink()
  except OSError as e:
    raise ValueError(f"cannot write {path}: {e.strerror or ' '.join(str(e).split())}") from e


def clear_leftovers(folder: Path, names: Iterable[str] | None = None):
  """Removes the temporary files that killed runs left in a folder: of files with these names, None: of all.

  Those that a run still writes are locked, and stay; so do all where the file system has no locks.
  """
  wanted = None if names is None else set(map(shorten, names))
  with contextlib.suppress(OSError):
    for entry in list(os.scandir(folder)):
      found = _TEMPORARY.fullmatch(entry.name)
      if found and (wanted is None or found[1] in wanted) and entry.is_file(follow_symlinks=False):
        with contextlib.suppress(OSError), open(entry.path, "rb+") as file:
          if lock(file):
            os.unlink(entry.path)


def lock(file: BinaryIO) -> bool:
  """Locks a file that is open for writing until it is closed; returns whether it is: some file systems have no locks.

  The kernel releases the lock when the process ends for whatever reason. Some file systems (gcsfuse) lock within one
  machine only.

  Raises:
    BlockingIOError: another process has locked it.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise
  except OSError:
    return False
  return True


def open_regular(path: Path) -> BinaryIO:
  """Opens a file for reading and appending, and makes it if it is missing.

  Raises:
    ValueError: it is a link, a folder, or a pipe or device, which could block.
    OSError: it cannot be opened.
  """
  if path.is_symlink() or (path.exists() and not path.is_file()):
    raise ValueError(f"{path} is not a regular file: delete it")
  return open(path, "a+b")


def shorten(name: str, limit: int = MAX_NAME) -> str:
  """Returns the part of a file's name that fits `limit` bytes."""
  data = os.fsencode(name)
  return name if len(data) <= limit else data[:limit].decode(errors="ignore")


def as_text(name: str) -> str:
  """Returns a name as text that UTF-8 can encode: bytes of it that are not UTF-8 become \\xNN."""
  return os.fsencode(name).decode(errors="backslashreplace")
