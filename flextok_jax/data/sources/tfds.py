"""TensorFlow Datasets in ArrayRecord files as an image source; needs no tensorflow."""

from collections.abc import Callable
import io
from typing import Any

import numpy as np

from flextok_jax.core import extras
from flextok_jax.core.errors import first_line, warn_once
from flextok_jax.data.sources import captions
from flextok_jax.data.sources.base import Record, StoredImages, UnreadableRecord, stored_record


class Tfds(StoredImages):
  """A TFDS image data set prepared as ArrayRecord files, read at random access through tfds.data_source.

  Pillow decodes the stored bytes, as it does files.

  Args:
    split: "train" or "validation".
    name: of the data set, such as "imagenet2012".
    data_dir: folder of prepared data sets; "": the default of TFDS.
    train_split, val_split: TFDS splits of "train" and "validation".
    image_key: feature with the image.
    label_key: integer feature; "": no label.
    caption_key: text feature or a sequence of texts, "captions/text" if nested; "": the caption is the label's name, if
      TFDS has one.

  Raises:
    ValueError: the data set, a split or a feature does not exist, or the files are not ArrayRecord.
  """

  def __init__(
    self,
    split: str,
    name: str,
    data_dir: str,
    train_split: str,
    val_split: str,
    image_key: str,
    label_key: str,
    caption_key: str = "",
  ):
    if train_split == val_split:
      raise ValueError(
        f"train_split and val_split of source 'tfds' are both {train_split!r}: validation must be held out"
      )
    what = f"TFDS data set {name!r}"
    tfds = extras.require("tensorflow_datasets", "tfds", what)  # late: slow to import
    folder = data_dir or tfds.core.constants.DATA_DIR
    prepare = f"tfds build {name}{f' --data_dir={data_dir}' if data_dir else ''} --file_format=array_record"
    try:
      builder = tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # tfds raises many types, some list all its data sets in the message
      raise ValueError(f"{what} cannot be found, by TFDS or in {folder}: {first_line(error)}") from error
    if not builder.info.splits:
      raise ValueError(f"{what} is not prepared in {folder}: run `{prepare}`")
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
    tfds_split = train_split if split == "train" else val_split
    try:
      self._records = builder.as_data_source(split=tfds_split, decoders={image_key: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:  # TFRecord files have no random access
      raise ValueError(
        f"{what} in {builder.data_dir} is not in ArrayRecord files, which random access needs: run "
        f"`tfds build {name} --data_dir=NEW_DIR --file_format=array_record`"
      ) from error
    except (ValueError, KeyError) as error:
      splits = ", ".join(builder.info.splits)
      raise ValueError(f"{what} has no split {tfds_split!r}; its splits are {splits}") from error
    self._name = f"{name} {tfds_split}"
    self._image_key, self._label_key, self._caption_key = image_key, label_key, caption_key
    self.class_names = tuple(getattr(label, "names", None) or ())

  def __len__(self) -> int:
    return len(self._records)

  def view(self, index: int, decode: Callable[[Any], Any], with_captions: bool = True) -> Record:
    record = self._records[index]
    try:
      image = decode(io.BytesIO(record[self._image_key]))
    except (OSError, ValueError) as error:
      raise UnreadableRecord(f"{self._name} [{index}]", error) from error
    label = int(record[self._label_key]) if self._label_key else -1
    name = self.class_names[label] if 0 <= label < len(self.class_names) else ""
    texts = self._captions(index, record) if self._caption_key and with_captions else ()
    return stored_record(image, label, texts or captions.clean([name.replace("_", " ")]))

  def _captions(self, index: int, record: dict) -> tuple[str, ...]:
    try:
      return captions.clean(_texts(record, self._caption_key.split("/")))
    except UnicodeDecodeError:
      warn_once(f"No caption in {self._name} [{index}]: its {self._caption_key} is no text in UTF-8")
      return ()


def _feature(features, path: str):
  """Returns the TFDS feature at "a/b", or the element of a sequence there; None if there is none."""
  for part in path.split("/"):
    features = getattr(features, "feature", features)  # of a sequence
    if not hasattr(features, "keys") or part not in features:
      return None
    features = features[part]
  return getattr(features, "feature", features)


def _texts(value, path: list[str]) -> list[str]:
  """Returns the texts at a path of a record, of all elements of sequences along it."""
  if isinstance(value, dict):
    return _texts(value[path[0]], path[1:])
  if isinstance(value, (str, bytes)):
    return [value.decode() if isinstance(value, bytes) else value]
  return [text for item in value for text in _texts(item, path)]
