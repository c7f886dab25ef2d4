"""The pictures under a folder."""

from collections import Counter
import dataclasses
import os
import re
import unicodedata

from flextok_jax.core.errors import warn_once
from flextok_jax.core.files import printable
from flextok_jax.core.images import EXTENSIONS

METADATA = ("metadata.jsonl", "metadata.csv")  # captions and labels of pictures, as of Hugging Face's imagefolder
CAPTION_FILES = (".txt", ".TXT", ".caption", ".json", ".JSON")  # beside a picture of the same name
# What operating systems and storage servers put into folders, in lower case.
_SYSTEM = {
  "__macosx",
  "@eadir",
  "@recycle",
  "@recently-snapshot",
  "@tmp",
  "#recycle",
  "#snapshot",
  "$recycle.bin",
  "recycler",
  "system volume information",
  "lost+found",
  "network trash folder",
  "~snapshot",
  "temporary items",
  "__pycache__",
}
_MOST_KINDS = 8  # that a message lists


@dataclasses.dataclass(frozen=True)
class Found:
  """What a folder holds; paths are relative to it.

  Attributes:
    files: pictures, sorted by the names along their paths.
    keys: of each picture, a text that is the same for all links to one file, and on all file systems.
    classes: names of the subfolders of the folder, in natural order (2 before 10) and Unicode's NFC.
    metadata: files named as in METADATA.
  """

  files: list[str]
  keys: list[str]
  classes: tuple[str, ...]
  metadata: list[str]


def natural(name: str) -> tuple:
  """Returns a key that sorts numbers in names by value: "2" before "10"."""
  return *((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)), (-1, name)


def normal(name: str) -> str:
  """Returns a name in NFC: macOS stores e + accent where other systems have one letter."""
  return unicodedata.normalize("NFC", name)


def class_of(path: str) -> str:
  """Returns the name of the class of a path relative to a folder, "" of files in the folder itself."""
  return normal(path.split(os.sep)[0]) if os.sep in path else ""


def is_left_out(name: str) -> bool:
  """Returns whether a file or folder is hidden or one of the system's."""
  return name.startswith(".") or name.lower() in _SYSTEM


def describe(counts: Counter[str]) -> str:
  """Returns what is left out, the most frequent kinds first: "12 .heic, 3 .pdf, 1 hidden"."""
  kinds = counts.most_common()
  rest = sum(count for _, count in kinds[_MOST_KINDS:])
  parts = [f"{count} {kind}" for kind, count in kinds[:_MOST_KINDS]] + ([f"{rest} of other kinds"] if rest else [])
  return ", ".join(parts)


def extension(name: str) -> str:
  """Returns the kind of a file for `describe`: its extension in lower case."""
  return printable(os.path.splitext(name)[1].lower()[:20]) or "without extension"


def list_images(folder: str) -> list[str]:
  """Returns the sorted paths of the pictures under a folder, see scan."""
  return [os.path.join(folder, path) for path in scan(folder).files]


def scan(folder: str) -> Found:
  """Finds the regular files with EXTENSIONS under a folder, links followed.

  Hidden files and folders, those of operating systems, links to a folder around them or to one that its class has
  already, and everything that is no picture are left out; one warning per folder counts them by extension.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: the folder cannot be read or has no picture.
  """
  if not os.path.isdir(folder):
    problem = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
    raise FileNotFoundError(f"the image folder {printable(folder)} {problem}")
  walk = _Walk(folder)
  name = printable(folder)
  total = sum(walk.left_out.values())
  what = f"left out of the image folder {name}: {describe(walk.left_out)}" if total else ""
  if not walk.files:
    tars = ": for tar files use data.sources.webdataset" if walk.left_out[".tar"] else ""
    raise ValueError(f"the image folder {name} has no picture ({what or 'it is empty'}){tars}")
  if what:
    warn_once(f"{what} (to use a picture among them, convert it to PNG or JPEG)")
  files = sorted(walk.files, key=lambda path: path.split(os.sep))
  return Found(files, [walk.files[path] for path in files], walk.classes(), sorted(walk.metadata))


class _Walk:
  """Walks through a folder.

  Attributes:
    files: {path of a picture: its key}.
    left_out: {kind: number of files or folders}.
    metadata: paths.
  """

  def __init__(self, folder: str):
    self._folder, self._root = folder, os.path.realpath(folder)
    self.files: dict[str, str] = {}
    self.left_out: Counter[str] = Counter()
    self.metadata: list[str] = []
    self._classes: set[str] = set()
    self._seen: set[tuple[str, str]] = set()  # (class, real path)
    self._keys = {self._root: ""}  # real path of a folder: key of the pictures in it
    folders = [""]
    while folders:
      folders += reversed(self._visit(folders.pop()))

  def classes(self) -> tuple[str, ...]:
    return tuple(sorted(self._classes, key=natural))

  def _visit(self, relative: str) -> list[str]:
    """Takes the pictures of a folder and returns its subfolders."""
    real = os.path.realpath(os.path.join(self._folder, relative))
    kind = class_of(os.path.join(relative, "x"))
    if relative and (self._root + os.sep).startswith(os.path.join(real, "")) or (kind, real) in self._seen:
      self.left_out["links to a folder that is read already"] += 1
      return []
    self._seen.add((kind, real))
    inside = real.startswith(os.path.join(self._root, ""))
    key = self._keys.setdefault(real, os.path.relpath(real, self._root) if inside else relative)
    try:
      with os.scandir(real) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    except OSError as e:
      if not relative:
        raise ValueError(f"the image folder {printable(self._folder)} cannot be read: {e.strerror}") from None
      self.left_out["folders that cannot be read"] += 1
      return []
    folders, others, stems = [], [], set()
    for entry in found:
      path, suffix = os.path.join(relative, entry.name), os.path.splitext(entry.name)[1].lower()
      is_folder = _holds(entry.is_dir)
      if is_left_out(entry.name):
        hidden = "hidden" if entry.name.startswith(".") else printable(entry.name)
        self.left_out[f"{hidden} {'folders' if is_folder else 'files'}"] += 1
      elif is_folder:
        folders.append(path)
      elif not _holds(entry.is_file):
        self.left_out["not regular files"] += 1
      elif suffix in EXTENSIONS:
        stems.add(os.path.splitext(entry.name)[0])
        self.files[path] = self._key(key, entry)
      elif entry.name in METADATA:
        self.metadata.append(path)
      else:
        others.append(entry.name)
    for name in others:
      stem, suffix = os.path.splitext(name)
      if stem not in stems or suffix not in CAPTION_FILES:
        self.left_out[extension(name)] += 1
    if not relative:
      self._classes.update(map(normal, folders))
    return folders

  def _key(self, folder: str, entry: os.DirEntry) -> str:
    path = os.path.join(folder, entry.name)
    if entry.is_symlink():
      parent, name = os.path.split(os.path.realpath(entry.path))
      inside = os.path.join(parent, "").startswith(os.path.join(self._root, ""))
      path = os.path.join(os.path.relpath(parent, self._root) if inside else self._keys.get(parent, ""), name)
    return normal(os.path.normpath(path).replace(os.sep, "/"))


def _holds(test) -> bool:
  """Returns test() of a directory entry; False if it cannot be examined, such as a link to itself."""
  try:
    return test()
  except OSError:
    return False
