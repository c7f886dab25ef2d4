"""What the demo computes, without its page: tokens of pictures, pictures of prefixes, edits, draws, searches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core import assets
from flextok_jax.core import images as images_lib
from flextok_jax.core.errors import quote
from flextok_jax.data.pictures import UnreadablePicture, open_picture
from flextok_jax.data.sources import base, synthetic
from flextok_jax.evals.metrics import image as image_metrics
from flextok_jax.inference import adaptive, image_files, programs, verifiers
from flextok_jax.inference import search as search_lib
from flextok_jax.inference import tokenizer as tokenizer_lib
from flextok_jax.inference.generator import ARGenerator
from flextok_jax.inference.prompts import Condition
from flextok_jax.inference.tokenizer import FlexTok, with_positions
from flextok_jax.ops import nested

Ids = tuple[int, ...]
Job = tuple[Ids, int]  # ids, and how many of them to decode

MAX_PIXELS = 2**25  # of an uploaded picture
MAX_TEXT = 10_000  # characters of pasted tokens
SCENES = (25, 33, 32, 28, 3, 2)  # examples: numbers of the validation split
EMOJI = (14, 38, 42, 35, 22, 13)  # examples: numbers of assets.pictures
CAPTIONS = ("cactus, flat", "strawberry, flat", "grinning face, flat", "soccer ball, flat")  # for generators of emoji
SEARCHES: dict[str, dict[str, Any]] = {  # settings of search_plan.Settings by what the page calls them
  "lookahead, 2 beams of 4": dict(algorithm="lookahead", beam_width=2, candidates=4, lookahead=-1, num_results=2),
  "best of 18": dict(algorithm="best_of_n", candidates=18, num_results=18),
  "beam search, 2 beams of 4": dict(algorithm="beam", beam_width=2, candidates=4, num_results=2),
}


@dataclasses.dataclass(frozen=True)
class SearchStep:
  """What a step of a search kept, best first: pictures uint8 [n, h, w, 3], scores [n] and ids of each."""

  num_tokens: int
  pictures: np.ndarray
  scores: list[float]
  ids: list[Ids]


class Models:
  """A tokenizer and, optionally, a generator of its tokens, for several users: one call of a model runs at a time."""

  def __init__(
    self,
    tokenizer: FlexTok,
    gen: ARGenerator | None = None,
    size: tuple[int, int] | None = None,
    posemb_scaling: str | None = None,
  ):
    """Takes the models and, unless they are the tokenizer's own, (height, width) of all pictures and its positions.

    Raises:
      ValueError: not the tokenizer of the generator, or a size that it does not take.
    """
    if gen is not None:
      gen.check_tokenizer(tokenizer)
    self._encoder = with_positions(tokenizer, posemb_scaling)
    self.tokenizer, self.gen = with_positions(tokenizer, posemb_scaling, ("decoder",)), gen
    self.size = size
    self._latent_shape = tokenizer.latent_shape if size is None else self.tokenizer.latent_shape_of(size)
    self.num_tokens = tokenizer.num_registers
    self.counts = nested.powers_of_two(self.num_tokens)
    self._sources = tokenizer.config.data.sources
    self.plain = self._sources.synthetic.weight > 0 and self._sources.synthetic.style == "plain"
    self._verifiers: dict[str, Callable] = {}
    self._lock = threading.Lock()

  # Pictures and tokens.

  def read(self, path: str) -> np.ndarray:
    """Returns the centre of a picture file, uint8 [h, w, 3].

    Raises:
      ValueError: it cannot be read, or has more than MAX_PIXELS.
    """
    try:
      picture = open_picture(path)
      if picture.width * picture.height > MAX_PIXELS:
        megapixels = f"{picture.width * picture.height / 1e6:.0f} megapixels"
        raise UnreadablePicture(f"{megapixels} are more than the {MAX_PIXELS / 1e6:.0f} that this page takes")
      return image_files.crop(picture, self.tokenizer, self.size)
    except UnreadablePicture as error:
      raise ValueError(f"the picture cannot be read: {error}") from error

  def examples(self) -> list[tuple[np.ndarray, str]]:
    """Returns pictures uint8 [h, w, 3] and their captions: scenes if the tokenizer was trained on some, else emoji."""
    if self._sources.synthetic.weight > 0:
      found = [(record["image"], record["caption"]) for record in self._scenes()]
    else:
      shipped = assets.pictures()
      found = [shipped[i] for i in EMOJI]
    return [(image_files.crop(picture, self.tokenizer, self.size), caption) for picture, caption in found]

  def captions(self) -> list[str]:
    """Returns texts to draw."""
    return [r["caption"] for r in self._scenes()[:4]] if self._sources.synthetic.weight > 0 else list(CAPTIONS)

  def _scenes(self) -> list[base.Record]:
    side = max(64, *(self.size or (self.tokenizer.image_size,)))
    scenes = synthetic.Synthetic("validation", side, self._sources.synthetic.style)
    return [scenes[i] for i in SCENES]

  @property
  def limits(self) -> str:
    """What to expect of a small model, by what it was trained on; "" for others."""
    if self.plain:
      return "This small model was trained on scenes like the examples: of a photograph it keeps some colours."
    if self._sources.emoji.weight > 0:
      return "This small model was trained on emoji and a few photographs: of a face it keeps the colours."
    return ""

  def encode(self, picture: np.ndarray) -> Ids:
    """Returns all token ids of a picture uint8 [h, w, 3]."""
    with self._lock:
      return tuple(np.asarray(self._encoder.tokenize(picture[None]))[0].tolist())

  def decode(self, jobs: Sequence[Job], seed: int) -> np.ndarray:
    """Returns the pictures uint8 [n, h, w, 3] of prefixes, all from one noise: that of FlexTok.detokenize(key=seed).

    One job, and any number of jobs, are one program each, whatever the lengths: all have room for all tokens.
    """
    size = 1 if len(jobs) == 1 else len(self.counts)
    noise = programs.sample_noise(jax.random.fold_in(jax.random.key(seed), 0)[None], self._latent_shape)
    noise = np.repeat(np.asarray(noise), size, 0)
    pictures = []
    for start in range(0, len(jobs), size):
      some = [ids[:count] for ids, count in jobs[start : start + size]]
      some += some[-1:] * (size - len(some))
      ids, keep_k = adaptive.pad_sequences([np.array(row) for row in some], self.num_tokens)
      with self._lock:
        pictures.append(
          np.asarray(_to_uint8(tokenizer_lib.decode_ids(self.tokenizer, ids, keep_k.astype(np.int32), noise)))
        )
    return np.concatenate(pictures)[: len(jobs)]

  def prefixes(self, ids: Ids, seed: int) -> dict[int, np.ndarray]:
    """Returns the picture of 1, 2, 4, ... tokens and of all, by the number of tokens."""
    counts = [count for count in self.counts if count < len(ids)] + [len(ids)]
    return dict(zip(counts, self.decode([(ids, count) for count in counts], seed)))

  def parse(self, text: str) -> Ids:
    """Returns the ids in a text, separated by spaces or commas.

    Raises:
      ValueError: no ids of this tokenizer, or too many.
    """
    found = re.split(r"[\s,;]+", text[:MAX_TEXT].strip(" \n\t,;[]()"))
    if not 1 <= len(found) <= self.num_tokens or found == [""] or len(text) > MAX_TEXT:
      count = 0 if found == [""] else len(found)
      raise ValueError(f"{count} tokens are given: this tokenizer takes 1 to {self.num_tokens}")
    for number, item in enumerate(found, 1):
      if not (item.isascii() and item.isdecimal() and int(item[:20]) < self.tokenizer.num_codes):
        raise ValueError(f"token {number} is {quote(item)}: ids are whole numbers, 0 to {self.tokenizer.num_codes - 1}")
    return tuple(map(int, found))

  def variants(self, ids: Ids, position: int, seed: int) -> list[Ids]:
    """Returns the ids, and copies in which token `position`, from 1, is another one at random."""
    others = np.random.default_rng([seed, position]).integers(0, self.tokenizer.num_codes, len(self.counts))
    changed = [(*ids[: position - 1], int(other), *ids[position:]) for other in others]
    return [ids, *changed[1:]]

  # Drawing and searching.

  @property
  def condition(self) -> str:
    """What the generator is conditioned on: "text", "class" or "none"."""
    return "none" if self.gen is None else self.gen.config.ar.condition

  def classes(self) -> list[tuple[str, int]]:
    """Returns (name, number) of the generator's classes."""
    assert self.gen is not None
    names = self.gen.class_names
    shown: Iterable[int] = range(self.gen.num_classes)
    if self.plain and names == synthetic.CLASS_NAMES:  # plain scenes have some of them
      shown = map(names.index, synthetic.PLAIN_SHAPES)
    return [(names[i] if i < len(names) else f"class {i}", i) for i in shown]

  def verifiers(self) -> list[str]:
    """Returns the names of the verifiers of a search, the best first."""
    return ["scenes"] * (self.plain and self.condition == "text") + ["likelihood"]

  def draw(self, condition: Condition, seed: int, **choices: Any) -> Iterator[tuple[Ids, bool]]:
    """Yields the ids that are drawn so far after each token, and whether they ended by themselves.

    Args:
      condition: a text, a class or None.
      seed: of the draws.
      **choices: guidance_scale, temperature and top_p of ARGenerator.generate.

    Raises:
      ValueError: an argument out of range.
    """
    assert self.gen is not None
    stream = self.gen.stream(jax.random.key(seed), **_given(condition), **choices)
    while True:
      with self._lock:
        row = next(stream, None)
      if row is None:
        return
      (ids,) = self.gen.trim(row)
      yield tuple(ids.tolist()), len(ids) < row.shape[1]

  def search(self, condition: Condition, seed: int, verifier: str, how: str) -> list[SearchStep]:
    """Returns what each step of a search kept; the first of the last step is the result.

    Args:
      condition: a text, a class or None.
      seed: of the draws and of the decoder's noise.
      verifier: one of verifiers().
      how: one of SEARCHES.

    Raises:
      ValueError: a caption that the verifier cannot read.
    """
    assert self.gen is not None
    if verifier not in self._verifiers:  # kept, because it holds its compiled program
      self._verifiers[verifier] = verifiers.make(verifier)
    keys = jax.random.fold_in(jax.random.key(seed), 0)[None]
    stop, steps = self.gen.stop_id, []
    with self._lock:
      settings = SEARCHES[how] | {"size": self.size}
      found = self.gen.search(keys, self.tokenizer, self._verifiers[verifier], **_given(condition), **settings)
      for step in found.steps:
        real = np.isfinite(step.scores[0])
        ids = step.ids[0][real]
        pictures = search_lib.decode(self.tokenizer, ids, stop, keys[np.zeros(len(ids), int)], 32, self.size)
        rows = [tuple(i for i in row if i != stop) for row in ids.tolist()]
        steps.append(SearchStep(ids.shape[1], np.asarray(_to_uint8(pictures)), step.scores[0][real].tolist(), rows))
    return steps

  def warm_up(self, progress: Callable[[str], None]) -> None:
    """Compiles what the page computes; progress is called with a line before each part."""
    progress("compiling the encoder")
    ids = self.encode(self.examples()[0][0])
    progress("compiling the decoder")
    for jobs in ([(ids, 1)], [(ids, count) for count in self.counts]):
      self.decode(jobs, 0)
    if self.gen is None:
      return
    condition: Condition = self.captions()[0] if self.condition == "text" else 0 if self.condition == "class" else None
    progress("compiling the generator")
    list(self.draw(condition, 0))
    progress("compiling the search")
    self.search(condition, 0, self.verifiers()[0], next(iter(SEARCHES)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the PSNR in dB of two pictures uint8 [h, w, 3]."""
  scaled = [jnp.asarray(x[None], jnp.float32) / 255 for x in (a, b)]
  return float(image_metrics.psnr(*scaled)[0])


def swap(a: Ids, b: Ids, count: int) -> Ids:
  """Returns the first `count` ids of a, and then those of b."""
  return (*a[:count], *b[count:])


_to_uint8 = jax.jit(images_lib.as_uint8)


def _given(condition: Condition) -> dict[str, Any]:
  """Returns a condition as arguments of a generator's methods."""
  if condition is None:
    return {}
  return {"prompts": [condition]} if isinstance(condition, str) else {"labels": [condition]}
