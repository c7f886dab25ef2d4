"""What the kinds of shards hold: how records come from images, and what the records depend on.

A content has
  what: its name in the plural;
  image_size: of the crops that it wants, or None for image files as they are stored;
  batch_size: images at once;
  plan: a dict of all that the records depend on beside the images, for plan.json, and
  meta: the names of those entries that readers ask of meta.json;
  describe(images) -> more entries of both that the sources decide;
  records(elements): the records, as bytes in order, of elements of split_images.Images, all readable.
"""

from collections.abc import Callable, Iterable, Iterator
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from flextok_jax.data.shards import features as teacher_shards
from flextok_jax.data.shards import images as image_shards
from flextok_jax.data.shards import latents as latent_shards
from flextok_jax.data.shards import tokens as shards
from flextok_jax.data.shards.split_images import Images


class _Encoded:
  """Crops as a model encodes them: encode(images uint8 [batch_size, s, s, 3]) -> what `rows` makes records of."""

  def __init__(self, encode: Callable[[np.ndarray], Any], image_size: int, batch_size: int):
    self.image_size, self.batch_size, self._encode = image_size, batch_size, encode

  def describe(self, images: Images) -> dict:
    del images
    return {}

  def records(self, elements: Iterable[dict]) -> Iterator[bytes]:
    """A batch is encoded while the one before it is written."""
    crops = ((crop, element) for element in elements for crop in element["crops"])
    pending = None
    while (batch := list(itertools.islice(crops, self.batch_size))) or pending:
      encoded = None
      if batch:
        stacked = np.stack([crop for crop, _ in batch])
        padded = np.pad(stacked, ((0, self.batch_size - len(batch)), (0, 0), (0, 0), (0, 0)), mode="edge")
        encoded = [element for _, element in batch], self._encode(padded)
      if pending:
        yield from self.rows(*pending)
      pending = encoded

  def rows(self, elements: list[dict], encoded: Any) -> Iterator[bytes]:
    """The records of the elements; what was encoded may have more rows."""
    raise NotImplementedError


class Tokens(_Encoded):
  """Token ids: encode gives ids int [batch_size, num_tokens], and lengths int [batch_size] or None.

  Args:
    tokenizer: {"fingerprint", "dtype", "image_size", "num_ids", "num_tokens"}; "sampler" with adaptive lengths.
    quality, metric: what the lengths were chosen by; None: encode gives no lengths.
  """

  what = shards.WHAT
  meta = ("fingerprint", "image_size", "num_ids", "num_tokens", "quality", "metric")

  def __init__(
    self, encode: Callable, tokenizer: dict, batch_size: int, quality: float | None = None, metric: str | None = None
  ):
    super().__init__(encode, tokenizer["image_size"], batch_size)
    if tokenizer["num_ids"] > shards.MAX_IDS:
      raise ValueError(f"token shards hold ids below {shards.MAX_IDS}, but this tokenizer has {tokenizer['num_ids']}")
    self._count, self._num_ids = tokenizer["num_tokens"], tokenizer["num_ids"]
    self.plan = {**tokenizer, "quality": quality, "metric": metric}

  def rows(self, elements: list[dict], encoded: tuple) -> Iterator[bytes]:
    ids, lengths = encoded
    ids = np.asarray(ids)[: len(elements)]
    lengths = np.full(len(ids), self._count) if lengths is None else np.asarray(lengths)[: len(elements)]
    if ids.shape[1] != self._count or ids.min() < 0 or ids.max() >= self._num_ids:
      raise ValueError(
        f"the tokenizer gave ids {ids.min()} to {ids.max()} of shape {list(ids.shape)}, outside "
        f"0 to {self._num_ids - 1} or not {self._count} an image"
      )
    if lengths.min() < 1 or lengths.max() > self._count:
      raise ValueError(f"the lengths {lengths.min()} to {lengths.max()} do not lie in 1 to {self._count}")
    for row, length, element in zip(ids, lengths, elements):
      yield shards.pack({**element, "ids": row, "length": length})


class _Arrays(_Encoded):
  """Arrays of one shape and type: encode gives them, [batch_size, *shape], in the type to store.

  A subclass has maker and name, which errors tell, and pack, of a record as its kind of shards has it.
  """

  maker = name = ""

  def __init__(self, encode: Callable, plan: dict, batch_size: int):
    super().__init__(encode, plan["image_size"], batch_size)
    self.plan = plan

  def rows(self, elements: list[dict], encoded) -> Iterator[bytes]:
    arrays = np.asarray(encoded)[: len(elements)]
    shape, dtype = list(arrays.shape[1:]), str(arrays.dtype)
    if shape != self.plan["shape"] or dtype != self.plan["dtype"]:
      raise ValueError(f"{self.maker} gave {dtype} {shape}, not {self.plan['dtype']} {self.plan['shape']}")
    if not np.isfinite(arrays.astype(jnp.float32)).all():
      raise ValueError(
        f"{self.maker} gave {self.name} that {dtype} cannot hold: give --dtype=bfloat16, or look at {self.maker}"
      )
    for row, element in zip(arrays, elements):
      yield self.pack({**element, self.name: row})


class Latents(_Arrays):
  """Moments of a VAE's posterior, [h, w, 2 c].

  The plan has {"fingerprint", "compute_dtype", "image_size", "shape", "dtype": one of latent_shards.DTYPES}.
  """

  what, maker, name = latent_shards.WHAT, "the VAE", "moments"
  meta = ("fingerprint", "image_size", "shape", "dtype")
  pack = staticmethod(latent_shards.pack)


class Features(_Arrays):
  """Features of a teacher's patches, [n, d].

  The plan has {"fingerprint", "teacher", "compute_dtype", "image_size", "shape", "dtype": one of latent_shards.DTYPES}.
  """

  what, maker, name = teacher_shards.WHAT, "the teacher", "features"
  meta = ("fingerprint", "teacher", "image_size", "shape", "dtype")
  pack = staticmethod(teacher_shards.pack)


class Pictures:
  """Image files, as they are stored, or PNG files of drawn pictures."""

  what = image_shards.WHAT
  image_size = None
  meta = ("framed", "flip")

  def __init__(self, batch_size: int):
    self.batch_size, self.plan = batch_size, {}

  def describe(self, images: Images) -> dict:
    """Whether the pipeline may crop and mirror; ValueError where the sources disagree."""
    facts = {name: {"framed": source.framed, "flip": source.flip} for name, source in images.sources.items()}
    (first, one), *others = facts.items()
    for name, other in others:
      if other != one:
        raise ValueError(
          f"{first} and {name} do not mix in image shards, as one may be cropped or mirrored and the "
          "other may not: write them apart, and mix them in training"
        )
    return one

  def records(self, elements: Iterable[dict]) -> Iterator[bytes]:
    return map(image_shards.pack, elements)
