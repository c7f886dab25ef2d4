"""Folders that a run writes to: on this machine, or in a bucket of Google Cloud Storage (gs://)."""

from collections.abc import Iterator, Sequence
import contextlib
import importlib.util
import os
from pathlib import Path
import secrets
import socket
import tempfile
import threading
import time

from absl import logging
from etils import epath

from flextok_jax.core.errors import first_line
from flextok_jax.core.extras import MissingPackageError

# epath then reads buckets by gcsfs alone; otherwise what works would depend on whether tensorflow is installed.
os.environ.setdefault("EPATH_USE_TF", "false")

_PREFIX = "gs://"
_UPLOAD_EVERY = 60.0  # seconds
_RENEW_EVERY = 30.0  # seconds between two writes of a lock in a bucket
_STALE_AFTER = 100.0  # seconds without a write after which its run is taken for dead


def is_remote(path: str | os.PathLike) -> bool:
  """Returns whether a path is in a bucket."""
  return os.fspath(path).startswith(_PREFIX)


def resolve(name: str | os.PathLike, argument: str = "workdir") -> epath.Path:
  """Returns the path of a folder or file: ~ is expanded, and gs:// leads to a bucket.

  Raises:
    ValueError: another scheme, or no name of a bucket.
    MissingPackageError: a package that buckets need is not installed.
  """
  text = os.path.expanduser(os.fspath(name))
  scheme, colon, rest = text.partition(":")
  if colon and scheme.isalnum() and (rest.startswith("//") or (scheme == "gs" and rest.startswith("/"))):
    if scheme != "gs" or not rest.startswith("//"):
      instead = f"write {_PREFIX}BUCKET/FOLDER" if scheme == "gs" else f"give a folder or {_PREFIX}BUCKET/FOLDER"
      raise ValueError(f"{argument}={text!r:.200} cannot be used: {instead}")
    if not rest.strip("/"):
      raise ValueError(f"{argument}={text} names no bucket: write {_PREFIX}BUCKET/FOLDER")
    for module in ("gcsfs", "google.cloud.storage"):  # for our files, and for orbax's
      if not _is_installed(module):
        raise MissingPackageError(module, "gcs", f"{argument}={text}")
  return epath.Path(text.rstrip("/") or "/")


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of the package google
    return False


@contextlib.contextmanager
def named(path: str | os.PathLike, argument: str = "workdir") -> Iterator[None]:
  """Raises whatever fails inside as one line that names the folder: the libraries of buckets raise many types."""
  try:
    yield
  except OSError as e:
    if not is_remote(path):
      raise ValueError(f"{argument}={os.fspath(path)} cannot be written: {e.strerror or e}") from e
    raise _remote_error(path, argument, e) from e
  except Exception as e:
    if isinstance(e, (ValueError, MissingPackageError)) or not is_remote(path):
      raise
    raise _remote_error(path, argument, e) from e


def _remote_error(path: str | os.PathLike, argument: str, e: Exception) -> ValueError:
  return ValueError(
    f"{argument}={os.fspath(path)} cannot be read or written ({type(e).__name__}: {first_line(e, 200)}): check the "
    "bucket's name and the credentials (gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS)"
  )


def check_writable(folder: epath.Path, argument: str = "workdir"):
  """Makes the folder if it is missing, and writes and removes a file there.

  Raises:
    ValueError: that fails.
  """
  probe = folder / f".{secrets.token_hex(4)}.tmp"
  with named(folder, argument):
    if not is_remote(folder) and Path(folder).exists() and not Path(folder).is_dir():
      raise ValueError(f"{argument}={os.fspath(folder)} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
      probe.write_bytes(b"\0" * 4096)
    finally:
      probe.unlink(missing_ok=True)


class Outputs:
  """The files of a run below `path`, a local folder: of a workdir in a bucket a temporary one that upload() copies.

  Args:
    folder: workdir, see resolve.
    fetch: files and folders in it that are read, or appended to.
  """

  def __init__(self, folder: epath.Path, fetch: Sequence[str] = ()):
    self._remote = folder if is_remote(folder) else None
    self.path = Path(folder)
    self._uploaded: dict[Path, tuple[int, int]] = {}
    self._at = time.monotonic()
    if self._remote is None:
      return
    self._temporary = tempfile.TemporaryDirectory(prefix="flextok_jax.")
    self.path = Path(self._temporary.name)
    with named(folder):
      for name in fetch:
        download(folder / name, self.path / name)
    self._uploaded = self._files()

  def _files(self) -> dict[Path, tuple[int, int]]:
    found = {path.relative_to(self.path): path.stat() for path in self.path.rglob("*") if path.is_file()}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in found.items()}

  def upload(self, *, now: bool = True):
    """Copies new and changed files to the bucket and removes deleted ones; if not `now`, at most once per minute.

    Raises:
      ValueError: that fails.
    """
    if self._remote is None or not (now or time.monotonic() - self._at >= _UPLOAD_EVERY):
      return
    files, self._at = self._files(), time.monotonic()
    with named(self._remote):
      for path in (path for path, version in files.items() if self._uploaded.get(path) != version):
        copy(self.path / path, self._remote / path)
      for path in self._uploaded.keys() - files.keys():
        (self._remote / path).unlink(missing_ok=True)
    self._uploaded = files

  def close(self):
    """Uploads, and removes the temporary folder."""
    if self._remote is not None:
      with self._temporary:
        self.upload()


def copy(source: epath.Path | Path, target: epath.Path | Path):
  """Copies a file to or from a bucket."""
  target.parent.mkdir(parents=True, exist_ok=True)
  with source.open("rb") as read, target.open("wb") as write:
    while block := read.read(2**24):
      write.write(block)


def download(source: epath.Path, target: Path):
  """Copies a file or a folder, if it exists, from a bucket."""
  if source.is_dir():
    for path in source.iterdir():
      download(path, target / path.name)
  elif source.exists():
    copy(source, target)


class Lease:
  """Keeps other runs out of a folder in a bucket, which has no locks, by a file .lock that its owner writes anew often.

  The file of a killed run is taken over after a wait in which it is seen not to change.

  Raises:
    ValueError: another run uses the folder.
  """

  def __init__(self, folder: epath.Path):
    self._path, self._host = folder / ".lock", socket.gethostname()
    self._owner = f"process {os.getpid()} on {self._host}, {secrets.token_hex(4)}"
    with named(folder):
      before = self._read()
      if before and not self._is_dead(before):
        logging.warning("%s may be in use by %s: waiting %.0f s", folder, before.partition(";")[0], _STALE_AFTER)
        time.sleep(_STALE_AFTER)
        if self._read() not in (before, ""):
          owner = self._read().rpartition(",")[0]
          raise ValueError(f"another run ({owner}) uses {os.fspath(folder)}: stop it, or use another workdir")
      self._write(0)
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._renew, daemon=True)
    self._thread.start()

  def _read(self) -> str:
    try:
      return self._path.read_text()
    except FileNotFoundError:
      return ""

  def _write(self, count: int):
    self._path.write_text(f"{self._owner}; {count}")

  def _is_dead(self, content: str) -> bool:
    words = content.split()  # process PID on HOST, ...
    if len(words) < 4 or words[3] != f"{self._host}," or not words[1].isdecimal():
      return False
    return int(words[1]) == os.getpid() or (os.path.exists("/proc/self") and not os.path.exists(f"/proc/{words[1]}"))

  def _renew(self):
    count = 0
    while not self._stopped.wait(_RENEW_EVERY):
      count += 1
      try:
        owner = self._read().partition(";")[0]
        if owner and owner != self._owner:
          logging.error("%s: another run (%s) has begun to use this workdir; stop one of them", self._path, owner)
        else:
          self._write(count)
      except Exception as e:  # the network may be back at the next time
        logging.warning("%s cannot be renewed (%s)", self._path, first_line(e, 200))

  def close(self):
    """Gives the folder up."""
    self._stopped.set()
    self._thread.join()
    with contextlib.suppress(Exception):
      self._path.unlink(missing_ok=True)
