"""Teacher shards: what python -m flextok_jax.tokenize --what=dino writes, for REPA beside latent shards.

The shards of data/shards/files.py. A record is the MessagePack array [features (little endian, as bytes), label,
num_objects, captions]; the copies of an image stand together. The features are those of the teacher's patches, row by
row. Shards of one config and as many copies have record i of the same crop, whatever they hold.
"""

from ml_collections import ConfigDict

from flextok_jax.data.shards import files as shard_files

WHAT = "dino"
_SAME = ("image_size", "num_records", "num_images", "copies", "seed", "sources", "crop", "crop_min_area", "flip")
_AGAIN = "write both (python -m flextok_jax.tokenize --what=latents and --what=dino) with one --config and --copies"


def pack(record: dict) -> bytes:
  """Returns the bytes of a record: {"features" [n, d], "label", "num_objects": int, "captions": list of str}."""
  return shard_files.pack_array(record["features"], record)


class Shards(shard_files.ArrayShards):
  """The records of a split at random access: shards[i] -> what pack takes.

  Attributes:
    meta: meta.json as a dict. fingerprint: of the teacher; dtype: of the features; shape: theirs, [n, d]; image_size;
      num_records; copies: records an image; class_names: list or None.

  Raises:
    FileNotFoundError, ValueError: as ShardFiles.
  """

  WHAT, NAME, KIND = WHAT, "features", "teacher"


class Beside:
  """The records of latent shards, each with the teacher's features of the same crop as "teacher" [n, d].

  Args:
    latents: latent_shards.Shards.
    teacher: Shards.
    config: of stage "tokenizer".
    grid: patches a side that the run wants.

  Raises:
    ValueError: the two are not of the same crops, or the features do not suit the config; when reading a record, it is
      not of the same image in both.
  """

  def __init__(self, latents: shard_files.ShardFiles, teacher: Shards, config: ConfigDict, grid: int):
    self._latents, self._teacher = latents, teacher
    for name in _SAME:
      one, other = latents.meta.get(name), teacher.meta.get(name)
      if one != other and None not in (one, other):  # shards from before a field was written do not tell
        raise ValueError(
          f"the teacher's features in config.data.teacher are not of the images of config.data.latents: "
          f"{name} is {other!r} there and {one!r} in the latents; {_AGAIN}"
        )
    count, width = teacher.meta["shape"]
    if width != config.repa.features:
      raise ValueError(
        f"the teacher shards have features of width {width}, but config.repa.features is "
        f"{config.repa.features}: give --config.repa.features={width}, or write others"
      )
    if count != grid**2:
      raise ValueError(
        f"the teacher shards have {count} patches an image, but this run wants {grid} x {grid}: give "
        f"--config.repa.grid={round(count**0.5)}, or write others"
      )

  def __len__(self) -> int:
    return len(self._latents)

  def __getitem__(self, index: int) -> dict:
    record, other = self._latents[index], self._teacher[index]
    for name in ("label", "num_objects", "captions"):
      if record[name] != other[name]:
        raise ValueError(
          f"record {index} has {name} {record[name]!r} in {self._latents} and {other[name]!r} in "
          f"{self._teacher}, so it is not of one image; {_AGAIN}"
        )
    return {**record, "teacher": other["features"]}
