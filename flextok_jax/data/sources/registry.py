"""The sources of images behind one interface.

A source is a random-access sequence: len(source), and source[i] -> {"image": Pillow image or uint8 array as stored,
"label": int, "caption": str, "num_objects": int}, numbers -1 where unknown. "captions" are all captions of the record,
"caption" is the first of them: where a source has but one, `read` adds them. Its attribute `framed` says that the
picture is composed already, so that the pipeline resizes without a random crop; `flip` whether mirroring leaves the
caption true. A record that cannot be read raises UnreadableRecord.

Some sources hold image files as they are stored (Stored). `view` gives their open file to a function, which may decode
only as much as it needs.
"""

from collections.abc import Callable
import hashlib
import io
import json
import os

from absl import logging
import numpy as np

from flextok_jax.data import transforms
from flextok_jax.data.shards import images as image_shards
from flextok_jax.data.sources import emoji, photos, synthetic

NAMES = ("synthetic", "emoji", "photos", "folder", "tfds", "arrayrecord")
SPLITS = ("train", "validation")
VALIDATION_PERCENT = 5  # of a folder without val_path
MAX_RUN = 20  # unreadable records in a row before reading stops
MAX_SIDECAR = 1_000_000  # bytes of a file with captions


class UnreadableRecord(Exception):
  """One record that cannot be decoded; `name` says which, `reason` why."""

  def __init__(self, name: str, reason: str):
    super().__init__(f"{name}: {reason}")
    self.name = name
    self.reason = reason

  def __reduce__(self):
    return (UnreadableRecord, (self.name, self.reason))


def make_source(name: str, cfg, split: str):
  """Returns the source of a split ("train" or "validation"); cfg is config.data.sources[name]."""
  if split not in SPLITS:
    raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
  if name == "synthetic":
    return synthetic.Synthetic(split, cfg.render_size, cfg.style)
  if name == "emoji":
    return emoji.Emoji(split, cfg.path)
  if name == "photos":
    return photos.Photos(split, cfg.min_crop)
  if name == "folder":
    return Folder(split, cfg.path, cfg.val_path)
  if name == "arrayrecord":
    return ArrayRecord(split, cfg.path)
  if name == "tfds":
    if cfg.train_split == cfg.val_split:
      raise ValueError(
        f"train_split and val_split of config.data.sources.tfds are both {cfg.train_split!r}: "
        "validation must be held out"
      )
    tfds_split = cfg.train_split if split == "train" else cfg.val_split
    return Tfds(tfds_split, cfg.name, cfg.data_dir, cfg.image_key, cfg.label_key, cfg.caption_key)
  raise ValueError(f"unknown data source {name!r}: use one of {', '.join(NAMES)}")


def is_validation(relative_path: str) -> bool:
  """The stable split of a folder without val_path: VALIDATION_PERCENT percent of the files, by a hash of their path."""
  digest = hashlib.sha256(relative_path.replace(os.sep, "/").encode()).digest()
  return int.from_bytes(digest[:4], "big") % 100 < VALIDATION_PERCENT


class Stored:
  """What holds image files: view(index, decode) -> a record with decode(open file) for an image."""

  framed = False
  flip = True

  def view(self, index: int, decode: Callable) -> dict:
    raise NotImplementedError

  def __getitem__(self, index: int) -> dict:
    return self.view(index, transforms.to_rgb)


def view(source, index: int, decode: Callable) -> dict:
  """Returns source[index] with decode(image) for its image: of the open file, where the source stores files."""
  if isinstance(source, Stored):
    return source.view(index, decode)
  record = source[index]
  return {**record, "image": decode(record["image"])}


class Folder(Stored):
  """A tree of jpg, jpeg, png and webp files; class = first subfolder below path (sorted), caption = its name.

  Beside X.jpg, X.txt (a caption a line) or else X.json ({"caption": str} or {"captions": [str, ...]}) has its captions.
  validation: val_path, or without it VALIDATION_PERCENT percent of path, by a hash of the file's relative path. Class
  numbers are path's in both splits; a file outside any subfolder, or in one that path lacks, has label -1.
  """

  def __init__(self, split: str, path: str, val_path: str = ""):
    if not path:
      raise ValueError("the folder source needs a folder: pass --config.data.sources.folder.path=DIR")
    if val_path and _nested(path, val_path):
      raise ValueError(f"the folder source's val_path {val_path} overlaps its path {path}: give two separate folders")
    files = _relative_files(path)
    self.class_names = tuple(sorted({_class_of(f) for f in files} - {""}))
    self._labels = {name: i for i, name in enumerate(self.class_names)}
    self._root = path
    if not val_path:
      files = [f for f in files if is_validation(f) == (split == "validation")]
    elif split == "validation":
      self._root, files = val_path, _relative_files(val_path)
    if not files:
      raise ValueError(
        f"the image folder {path} is too small to hold out {VALIDATION_PERCENT} percent "
        f"(none fell to {split}): pass --config.data.sources.folder.val_path=DIR"
      )
    self._files = files

  def __len__(self) -> int:
    return len(self._files)

  def view(self, index: int, decode: Callable) -> dict:
    file = self._files[index]
    path = os.path.join(self._root, file)
    try:
      with open(path, "rb") as f:
        image = decode(f)
    except transforms.DECODE_ERRORS as error:
      raise UnreadableRecord(path, str(error)) from error
    name = _class_of(file)
    captions = _sidecar_captions(os.path.splitext(path)[0]) or (name.replace("_", " "),)
    return {
      "image": image,
      "label": self._labels.get(name, -1),
      "caption": captions[0],
      "captions": captions,
      "num_objects": -1,
    }


def _sidecar_captions(stem: str) -> tuple[str, ...]:
  """Returns the captions in stem.txt or else stem.json; () where there is neither."""
  for path, parse in ((f"{stem}.txt", str.splitlines), (f"{stem}.json", _json_captions)):
    try:
      with open(path, "rb") as f:
        data = f.read(MAX_SIDECAR + 1)
      if len(data) > MAX_SIDECAR:
        raise ValueError(f"more than {MAX_SIDECAR} bytes")
      return _clean(parse(data.decode("utf-8-sig")))
    except FileNotFoundError:
      continue
    except (OSError, ValueError, RecursionError) as error:
      raise UnreadableRecord(path, _first_line(error)) from error
  return ()


def _json_captions(text: str) -> list[str]:
  values = json.loads(text)
  if isinstance(values, dict):
    captions = values["captions"] if "captions" in values else [values.get("caption")]
    if isinstance(captions, list) and all(isinstance(caption, str) for caption in captions):
      return captions
  raise ValueError('neither {"caption": "..."} nor {"captions": ["...", ...]}')


def _clean(captions) -> tuple[str, ...]:
  """Returns the captions, each in one line and none empty; ValueError where none is left."""
  captions = tuple(line for line in (" ".join(caption.split()) for caption in captions) if line)
  if not captions:
    raise ValueError("no caption")
  return captions


def _relative_files(folder: str) -> list[str]:
  return [os.path.relpath(path, folder) for path in transforms.list_images(folder)]


def _class_of(relative_path: str) -> str:
  return relative_path.split(os.sep)[0] if os.sep in relative_path else ""


def _nested(one: str, other: str) -> bool:
  one, other = os.path.realpath(one), os.path.realpath(other)
  return os.path.commonpath((one, other)) in (one, other)


class ArrayRecord(Stored):
  """Image files in the records of image shards, which python -m flextok_jax.tokenize --what=images wrote to path.

  A record has the label, the captions and the split that it had in the sources that were written.
  """

  def __init__(self, split: str, path: str):
    if not path:
      raise ValueError("the arrayrecord source needs a folder: pass --config.data.sources.arrayrecord.path=DIR")
    self._records = image_shards.Shards(path, split)
    meta = self._records.meta
    self.framed, self.flip, self.class_names = meta["framed"], meta["flip"], tuple(meta["class_names"] or ())

  def __len__(self) -> int:
    return len(self._records)

  def view(self, index: int, decode: Callable) -> dict:
    try:
      record = self._records[index]
    except ValueError as error:
      raise UnreadableRecord(f"{self._records} [{index}]", _first_line(error)) from error
    try:
      image = decode(io.BytesIO(record["data"]))
    except transforms.DECODE_ERRORS as error:
      raise UnreadableRecord(f"{self._records} [{index}]", str(error)) from error
    captions = tuple(record["captions"]) or ("",)
    return {
      "image": image,
      "label": record["label"],
      "caption": captions[0],
      "captions": captions,
      "num_objects": record["num_objects"],
    }


class Tfds(Stored):
  """A TFDS image data set prepared as ArrayRecord, read at random access through tfds.data_source; needs no tensorflow.

  The stored bytes are decoded by Pillow, like files. label_key "" means no label. caption_key is a text feature, or a
  sequence of them, in the manner of "captions/text" where it lies within others; "" makes the label's name the caption,
  where TFDS has one.
  """

  def __init__(self, split: str, name: str, data_dir: str, image_key: str, label_key: str, caption_key: str = ""):
    import tensorflow_datasets as tfds  # late: slow to import, and only this source needs it

    what = f"TFDS data set {name!r}"
    place = data_dir or tfds.core.constants.DATA_DIR
    prepare = f"tfds build {name}{f' --data_dir={data_dir}' if data_dir else ''} --file_format=array_record"
    try:
      builder = tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # tfds raises many types, some with the list of all its data sets as message
      raise ValueError(f"{what} cannot be found, by TFDS or in {place}: {_first_line(error)}") from error
    if not builder.info.splits:
      raise ValueError(f"{what} is not prepared in {place}: run `{prepare}`")
    features = dict(builder.info.features)
    names = ", ".join(features)
    if not isinstance(features.get(image_key), tfds.features.Image):
      raise ValueError(f"{what} has no image feature {image_key!r}; its features are {names}")
    label = features.get(label_key)
    if label_key and (label is None or label.shape != () or not np.issubdtype(label.np_dtype, np.integer)):
      raise ValueError(f"{what} has no integer label {label_key!r}; its features are {names} ('' for no label)")
    caption = _feature(builder.info.features, caption_key)
    if caption_key and getattr(caption, "np_dtype", None) != np.object_:  # TFDS's type of text
      raise ValueError(
        f"{what} has no text {caption_key!r}; its features are {names} ('' for the label's name; "
        "'captions/text' for the text within captions)"
      )
    try:
      self._records = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:  # TFRecord files have no random access
      raise ValueError(
        f"{what} in {builder.data_dir} is not in ArrayRecord files, which random access needs: run "
        f"`tfds build {name} --data_dir=NEW_DIR --file_format=array_record`"
      ) from error
    except (ValueError, KeyError) as error:
      splits = ", ".join(builder.info.splits)
      raise ValueError(f"{what} has no split {split!r}; its splits are {splits}") from error
    self._name, self._image_key, self._label_key = f"{name} {split}", image_key, label_key
    self._caption_key = caption_key
    self.class_names = tuple(getattr(label, "names", None) or ())

  def __len__(self) -> int:
    return len(self._records)

  def view(self, index: int, decode: Callable) -> dict:
    record = self._records[index]
    try:
      image = decode(io.BytesIO(record[self._image_key]))
    except transforms.DECODE_ERRORS as error:
      raise UnreadableRecord(f"{self._name} [{index}]", str(error)) from error
    label = int(record[self._label_key]) if self._label_key else -1
    captions = (self.class_names[label].replace("_", " ") if 0 <= label < len(self.class_names) else "",)
    if self._caption_key:
      try:
        captions = _clean(_texts(record, self._caption_key.split("/")))
      except ValueError as error:
        raise UnreadableRecord(f"{self._name} [{index}], {self._caption_key}", _first_line(error)) from error
    return {"image": image, "label": label, "caption": captions[0], "captions": captions, "num_objects": -1}


def _feature(features, path: str):
  """Returns the TFDS feature at "a/b", or what a sequence there consists of; None where there is none."""
  for part in path.split("/"):
    features = getattr(features, "feature", features)  # of a sequence
    if not hasattr(features, "keys") or part not in features:
      return None
    features = features[part]
  return getattr(features, "feature", features)


def _texts(value, path: list[str]) -> list[str]:
  """Returns the texts at a path of a record; sequences on the way are walked through."""
  if isinstance(value, dict):
    return _texts(value[path[0]], path[1:])
  if isinstance(value, (str, bytes)):
    return [value.decode() if isinstance(value, bytes) else value]
  return [text for item in value for text in _texts(item, path)]


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]


_named = set()  # unreadable records that the log has named already


def read(source, index: int, decode: Callable | None = None) -> tuple[dict, int]:
  """Returns the record at index or the next readable one (wrapping around), and the number of records passed over.

  The record is source[i], or with `decode` that of view. Each unreadable record is named once in the log of its
  process. ValueError after MAX_RUN unreadable ones in a row.
  """
  skipped = 0
  while True:
    place = (index + skipped) % len(source)
    try:
      record = source[place] if decode is None else view(source, place, decode)
      return {"captions": (record["caption"],), **record}, skipped
    except UnreadableRecord as error:
      skipped += 1
      if error.name not in _named:
        _named.add(error.name)
        logging.warning("Unreadable image passed over: %s", error)
      if skipped >= min(MAX_RUN, len(source)):
        raise ValueError(f"{skipped} images in a row are unreadable, the last one is {error}") from error
