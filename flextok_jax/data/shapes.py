"""Shapes of batches: which pictures are read at which height and width, so that each batch has one shape."""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import dataclasses
from typing import Any

import grain
import numpy as np

from flextok_jax.core import unreadable
from flextok_jax.core.progress import Bar, on_terminal
from flextok_jax.data import transforms
from flextok_jax.data.sources import base

Shape = tuple[int, int]  # height and width, pixels
_SAME_ASPECT = 1e-3  # of logarithms


@dataclasses.dataclass(frozen=True)
class Bucket:
  """The pictures that are read in one shape.

  Attributes:
    shape: of their crops.
    weight: share of the batches.
    sources: {kind of source: (share of the rows of a batch, source of the pictures)}; {} of shards.
    pictures: number of pictures, if they are divided by their sizes; else None.
    kept: mean and smallest share of a picture that its largest crop keeps; None if their sizes are not known.
    enlarged: share of the pictures that are enlarged; None if their sizes are not known.
  """

  shape: Shape
  weight: float
  sources: Mapping[str, tuple[float, base.Source]]
  pictures: int | None = None
  kept: tuple[float, float] | None = None
  enlarged: float | None = None


class Part(base.StoredImages):
  """Some pictures of a source of stored images."""

  def __init__(self, source: base.Source, indices: np.ndarray):
    self._source, self._indices = source, indices
    self.framed, self.flip, self.class_names = source.framed, source.flip, source.class_names

  def __len__(self) -> int:
    return len(self._indices)

  def view(self, index: int, decode: Callable[[Any], Any], with_captions: bool = True) -> base.Record:
    return base.view(self._source, int(self._indices[index]), decode, with_captions)


def check_weights(shapes: Sequence[Shape], weights: Sequence[float]) -> None:
  """Raises ValueError if there is not one weight for each shape."""
  if len(weights) != len(shapes):
    raise ValueError(f"data.shape_weights has {len(weights)} weights for {len(shapes)} data.shapes: give one for each")


def whole(sources: Mapping[str, base.Source], shares: Mapping[str, float], shape: Shape) -> Bucket:
  """Returns the bucket of all pictures.

  Args:
    sources: {kind of source: source}.
    shares: {kind of source: weight of its pictures}.
    shape: of their crops.
  """
  return Bucket(shape, 1.0, {kind: (shares[kind], source) for kind, source in sources.items()})


def by_weight(
  sources: Mapping[str, base.Source], shares: Mapping[str, float], shapes: Sequence[Shape], weights: Sequence[float]
) -> list[Bucket]:
  """Returns a bucket for each shape, each of all pictures.

  Args:
    sources: see whole, as for shares.
    shapes: of the crops.
    weights: of the shapes.

  Raises:
    ValueError: not one weight for each shape.
  """
  check_weights(shapes, weights)
  total = sum(weights)
  return [
    dataclasses.replace(whole(sources, shares, shape), weight=weight / total) for shape, weight in zip(shapes, weights)
  ]


def by_size(
  sources: Mapping[str, base.Source],
  shares: Mapping[str, float],
  shapes: Sequence[Shape],
  num_threads: int,
  max_unreadable: float,
) -> list[Bucket]:
  """Divides pictures by their sizes, see nearest; shapes that no picture has are left out.

  The weight of a bucket is the share of its pictures, those of each source with the weight of the source.

  Args:
    sources: see whole, as for shares.
    shapes: of the crops.
    num_threads: that read the headers of the pictures.
    max_unreadable: share of unreadable pictures above which reading stops.

  Raises:
    ValueError: a source draws its pictures, so that they have no sizes, or too many pictures are unreadable.
  """
  sizes = {}
  for kind, source in sources.items():
    sizes[kind] = read_sizes(kind, source, num_threads, max_unreadable)
  chosen = {kind: np.where(found[:, 0] > 0, nearest(found, shapes), -1) for kind, found in sizes.items()}
  readable = {kind: (numbers >= 0).sum() for kind, numbers in chosen.items()}
  total = sum(shares[kind] for kind in sources)
  buckets = []
  for i, shape in enumerate(shapes):
    rows = {kind: np.flatnonzero(numbers == i) for kind, numbers in chosen.items()}
    rows = {kind: found for kind, found in rows.items() if len(found)}
    if not rows:
      continue
    weights = {kind: shares[kind] / total * len(found) / readable[kind] for kind, found in rows.items()}
    found = np.concatenate([sizes[kind][numbers] for kind, numbers in rows.items()])
    share = kept_share(found, shape)
    enlarged = (found[:, 0] < shape[0]) | (found[:, 1] < shape[1])
    buckets.append(
      Bucket(
        shape,
        sum(weights.values()),
        {kind: (weights[kind], Part(sources[kind], numbers)) for kind, numbers in rows.items()},
        len(found),
        (float(share.mean()), float(share.min())),
        float(enlarged.mean()),
      )
    )
  return buckets


def read_sizes(kind: str, source: base.Source, num_threads: int, max_unreadable: float) -> np.ndarray:
  """Returns the height and width of each picture from its header, int32 [n, 2]; 0, 0 if it is unreadable.

  Raises:
    ValueError: the source draws its pictures, or too many are unreadable, or all.
  """
  if not isinstance(source, base.StoredImages):
    raise ValueError(
      f"data.shapes cannot be chosen by the sizes of the pictures of source {kind!r}, which are drawn: set "
      "data.shape_weights to the share of each shape"
    )

  def size(index: int) -> Shape | str:
    try:
      return source.view(index, lambda file: transforms.size_of(file, "none", 0, 1), with_captions=False)["image"]
    except base.UnreadableRecord as error:
      unreadable.skip(error, key=error.name)
      return str(error)

  found, reasons = np.zeros((len(source), 2), np.int32), []
  with (
    concurrent.futures.ThreadPoolExecutor(max(num_threads, 1)) as pool,
    Bar(len(source), "picture sizes", on_terminal(), transient=True) as bar,
  ):
    for i, result in enumerate(pool.map(size, range(len(source)))):
      if isinstance(result, str):
        reasons.append(result)
      else:
        found[i] = result
      bar(i + 1)
  what, example = f"{len(source)} images of source {kind!r}", reasons[0] if reasons else ""
  unreadable.check(len(reasons), len(source), max_unreadable, what=what, example=example)
  if len(reasons) == len(source):
    raise ValueError(f"none of {what} can be read: {example}")
  return found


def nearest(sizes: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
  """Returns the number of the shape [n] of each size, int [n, 2]: that of the nearest aspect ratio.

  Of several shapes of this aspect ratio, the largest that does not enlarge the picture, else the smallest.
  """
  wanted, sizes = np.array(shapes, float), np.maximum(sizes, 1).astype(float)
  # [n, shapes]
  distance = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - np.log(wanted[:, 0] / wanted[:, 1]))
  candidates = distance <= distance.min(1, keepdims=True) + _SAME_ASPECT
  area = wanted.prod(1)
  fits = (sizes[:, None] >= wanted).all(-1)
  rank = np.where(fits, area, -area)  # the largest of those that fit comes before the smallest of the others
  return np.where(candidates, rank, -np.inf).argmax(1)


def kept_share(sizes: np.ndarray, shape: Shape) -> np.ndarray:
  """Returns the share [n] of the area of pictures of sizes int [n, 2] that the largest crop to a shape keeps."""
  ratio = sizes[:, 0] / sizes[:, 1] * shape[1] / shape[0]
  return np.minimum(ratio, 1 / ratio)


def table(buckets: Sequence[Bucket]) -> str:
  """Returns a table of what each shape costs, a row each."""
  rows: list[tuple[str, ...]] = [("height x width", "batches", "pictures", "kept", "least kept", "enlarged")]
  for bucket in buckets:
    kept = ("-", "-") if bucket.kept is None else tuple(f"{share:.1%}" for share in bucket.kept)
    enlarged = "-" if bucket.enlarged is None else f"{bucket.enlarged:.1%}"
    pictures = "all" if bucket.pictures is None else f"{bucket.pictures:,}"
    rows.append((f"{bucket.shape[0]} x {bucket.shape[1]}", f"{bucket.weight:.1%}", pictures, *kept, enlarged))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


class Turns:
  """An endless sequence of (part, how many turns of the part are before): parts take turns by their weights."""

  def __init__(self, weights: Sequence[float]):
    # Turn n of part i is the number n * count + i.
    self._count = len(weights)
    numbers = [grain.MapDataset.range(i, base.ENDLESS, self._count) for i in range(self._count)]
    self._numbers = grain.MapDataset.mix(numbers, weights=weights)

  def __len__(self) -> int:
    return len(self._numbers)

  def __getitem__(self, turn: int) -> tuple[int, int]:
    number, part = divmod(int(self._numbers[turn]), self._count)
    return part, number


class Interleaved:
  """An endless sequence of rows in which each group of `group` consecutive ones is of one part.

  Parts take turns by their weights, in a fixed order. A part's rows are used in their order, so that row i depends on i
  alone.

  Args:
    parts: endless random-access sequences.
    weights: share of the groups of each part.
    group: rows.
  """

  def __init__(self, parts: Sequence[Any], weights: Sequence[float], group: int):
    self._parts, self._group = parts, group
    self._turns = Turns(weights)

  def __len__(self) -> int:
    return len(self._turns) * self._group

  def __getitem__(self, index: int) -> Any:
    turn, row = divmod(int(index), self._group)
    part, number = self._turns[turn]
    return self._parts[part][number * self._group + row]
