"""What plain scenes of the source `synthetic` show: read from captions, and from pictures by the network that ships."""

import functools
from pathlib import Path
import re
from typing import TYPE_CHECKING, Any

from flax.traverse_util import unflatten_dict
import jax
import numpy as np

from flextok_jax.core import assets
from flextok_jax.data.sources import synthetic
from flextok_jax.inference import batches
from flextok_jax.models.perception.scenes import SceneClassifier
from flextok_jax.parallel import batching
from flextok_jax.weights.perception import files

if TYPE_CHECKING:
  from flextok_jax.inference.search import Candidates

WEIGHTS = assets.FOLDER / "scenes.safetensors"  # experiments/scene_classifier.py
HEADS = (  # question, number of answers; shape and colour are those of the largest object
  ("shape", len(synthetic.CLASS_NAMES)),
  ("color", len(synthetic.COLOR_NAMES)),
  ("background", len(synthetic.COLOR_NAMES)),
  ("objects", synthetic.MAX_OBJECTS),
)
_COLORS = "|".join(synthetic.COLOR_NAMES)
_OBJECT = re.compile(rf"(an?|{'|'.join(synthetic.NUMBERS)}) ({_COLORS}) (\w+)")


def read_caption(caption: str) -> dict[str, int]:
  """Returns the answers that a caption of a plain scene gives: {question: number}.

  Raises:
    ValueError: the caption does not have this form.
  """
  things, _, ground = caption.partition(" on a plain ")
  background = ground.removesuffix(" background")
  objects = [_OBJECT.fullmatch(part) for part in re.split(", | and ", things)]
  found = [match.groups() for match in objects if match]
  shape = found[0][2] if found else ""
  if shape not in synthetic.CLASS_NAMES:  # a plural
    shape = shape[:-2] if shape[:-2] in synthetic.CLASS_NAMES else shape[:-1]
  total = sum(1 if number in ("a", "an") else synthetic.NUMBERS.index(number) for number, _, _ in found)
  known = shape in synthetic.CLASS_NAMES and background in synthetic.COLOR_NAMES
  if len(found) < len(objects) or not known or not 1 <= total <= synthetic.MAX_OBJECTS:
    raise ValueError(
      f"{caption!r:.80} is no caption of a plain scene, such as 'a red ring and two blue hearts on a plain white "
      "background'"
    )
  return {
    "shape": synthetic.CLASS_NAMES.index(shape),
    "color": synthetic.COLOR_NAMES.index(found[0][1]),
    "background": synthetic.COLOR_NAMES.index(background),
    "objects": total - 1,
  }


class Scenes:
  """The log-probability that a picture shows what a plain scene's caption says, by the network that ships."""

  def __init__(self, path: Path = WEIGHTS):
    network = SceneClassifier(HEADS)

    def score(params: dict, images: jax.Array, answers: jax.Array) -> jax.Array:
      logits: Any = network.apply({"params": params}, images)
      chosen = [
        jax.nn.log_softmax(logits[name])[jax.numpy.arange(len(images)), answers[:, i]]
        for i, (name, _) in enumerate(HEADS)
      ]
      return sum(chosen[1:], chosen[0])

    self._score = batching.Batched(score, _load(path), 128, batches.local_mesh())

  def __call__(self, candidates: "Candidates") -> np.ndarray:
    """See verifiers."""
    assert candidates.images is not None
    if candidates.prompts is None:
      raise ValueError("verifier 'scenes' reads captions: give prompts")
    answers = [read_caption(prompt) for prompt in candidates.prompts]
    return self._score(candidates.images, np.array([[x[name] for name, _ in HEADS] for x in answers], np.int32))


@functools.lru_cache(maxsize=2)
def _load(path: Path) -> dict:
  return unflatten_dict(files.read(path), sep="/")
