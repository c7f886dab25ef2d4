"""Verifiers: they score the candidates of a search, larger is better.

A verifier is any function of search.Candidates that returns a score for each. One with the attribute needs_images =
False gets none, and nothing is decoded for it. Networks come from one folder (weights/perception/networks.py).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core.errors import quote
from flextok_jax.core.images import to_float
from flextok_jax.inference import batches
from flextok_jax.inference.scenes import Scenes
from flextok_jax.parallel import batching
from flextok_jax.weights.perception import files, networks

if TYPE_CHECKING:
  from flextok_jax.inference.search import Candidates

MODES = ("rank", "weighted")  # of ensembles
_BATCH = 32
_UNIT = lambda images: (images + 1) / 2  # [-1, 1] to [0, 1]


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """The log-probability under the guided generator: of all tokens, or of those of the last step alone."""

  last_step: bool = False
  needs_images = False

  def __call__(self, candidates: "Candidates") -> np.ndarray:
    """See the module."""
    return candidates.step_log_probs if self.last_step else candidates.log_probs


class _OfImages:
  """A network's scores of images [n, h, w, 3] in [0, 1] and of one more array [n, ...]."""

  def __init__(self, network: Any, score: Callable):
    self._score = batching.Batched(score, network, _BATCH, batches.local_mesh())

  def __call__(self, images: np.ndarray, facts: np.ndarray) -> np.ndarray:
    return self._score(_UNIT(images), np.asarray(facts))


class Clip:
  """The cosine of CLIP's features of image and prompt. PickScore and HPSv2 are CLIPs with other weights."""

  def __init__(self, weights: str | None):
    images, self._encode = networks.clip(weights, "clip")
    self._scores = _OfImages(images, lambda network, x, text: (network(x) * text).sum(-1))

  def __call__(self, candidates: "Candidates") -> np.ndarray:
    """See the module."""
    assert candidates.images is not None
    if candidates.prompts is None:
      raise ValueError("verifier 'clip' compares images with prompts: give prompts")
    texts = list(dict.fromkeys(candidates.prompts))
    features = dict(zip(texts, self._encode(texts)))
    return self._scores(candidates.images, np.stack([features[text] for text in candidates.prompts]))


class Aesthetic:
  """Linear layers on CLIP's image features, such as LAION's aesthetic predictors.

  The head is "aesthetic" in the folder, .safetensors or .npz: `weight` [1, d] and `bias` [1]; or several layers, named
  layers.0.weight, layers.0.bias, layers.2.weight and so on, applied in the order of their numbers.
  """

  def __init__(self, weights: str | None):
    images, _ = networks.clip(weights, "aesthetic")
    layers = _read_head(networks.find(weights, "aesthetic", "aesthetic"))

    def score(arguments: Any, x: jax.Array, _: jax.Array) -> jax.Array:
      network, layers = arguments
      y = network(x)
      for kernel, bias in layers:
        y = y @ kernel.T + bias
      return y[:, 0]

    self._scores = _OfImages((images, layers), score)

  def __call__(self, candidates: "Candidates") -> np.ndarray:
    """See the module."""
    assert candidates.images is not None
    return self._scores(candidates.images, np.zeros(len(candidates.images), np.float32))


def _read_head(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
  tensors = files.read(path)
  found: dict[int, dict[str, np.ndarray]] = {}
  for name, tensor in tensors.items():
    match = re.fullmatch(r"(?:layers\.(\d{1,4})\.)?(weight|bias)", name)
    if not match:
      raise ValueError(f"{path}: {quote(name)} is no tensor of a linear head")
    found.setdefault(int(match[1] or 0), {})[match[2]] = tensor
  layers: list[tuple[np.ndarray, np.ndarray]] = []
  for number in sorted(found):
    layer = found[number]
    if (
      set(layer) != {"weight", "bias"} or layer["weight"].ndim != 2 or layer["bias"].shape != layer["weight"].shape[:1]
    ):
      raise ValueError(f"{path}: layer {number} needs a weight [out, in] and a bias [out]")
    if layers and layers[-1][1].shape != layer["weight"].shape[1:]:
      raise ValueError(f"{path}: layer {number} takes {layer['weight'].shape[1]} features, not {len(layers[-1][1])}")
    layers.append((layer["weight"], layer["bias"]))
  if not layers or len(layers[-1][1]) != 1:
    raise ValueError(f"{path}: the last layer of a head must return one score")
  return layers


class Top1:
  """The log-probability of the asked class by a classifier of images."""

  def __init__(self, weights: str | None):
    network = networks.classifier(weights, "top1")

    def score(network: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
      return jnp.take_along_axis(jax.nn.log_softmax(network(x)), labels[:, None], -1)[:, 0]

    self._scores = _OfImages(network, score)

  def __call__(self, candidates: "Candidates") -> np.ndarray:
    """See the module."""
    assert candidates.images is not None
    if candidates.labels is None:
      raise ValueError("verifier 'top1' asks for a class: give labels")
    return self._scores(candidates.images, candidates.labels)


class Reference:
  """Nearness to a reference image of each prompt: with "psnr", tokens are sought whose picture is the image."""

  def __init__(self, name: str, references: Any, weights: str | None):
    if references is None:
      raise ValueError(f"verifier {name!r} compares with an image for each prompt: give references")
    references = jnp.asarray(references)
    if references.ndim != 4 or references.shape[-1] != 3:
      raise ValueError(f"references must be images [prompts, h, w, 3], got shape {list(references.shape)}")
    self._references = np.asarray(_UNIT(to_float(references)))
    network, sign = {
      "psnr": lambda: (None, 1),
      "lpips": lambda: (networks.lpips(weights, "alex"), -1),
      "dreamsim": lambda: (networks.dreamsim(weights), -1),
      "dinov2": lambda: (networks.similarity(weights), 1),
    }[name]()

    def score(network: Any, x: jax.Array, y: jax.Array) -> jax.Array:
      if network is None:
        return -10 * jnp.log10(jnp.maximum(jnp.square(jnp.clip(x, 0, 1) - y).mean((1, 2, 3)), 1e-10))
      return sign * network(x, y)

    self._scores = _OfImages(network, score)

  def __call__(self, candidates: "Candidates") -> np.ndarray:
    """See the module."""
    assert candidates.images is not None
    if candidates.which.max() >= len(self._references):
      raise ValueError(f"{len(self._references)} references are fewer than the prompts: give one for each")
    sizes = [list(images.shape[1:3]) for images in (self._references, candidates.images)]
    if sizes[0] != sizes[1]:
      raise ValueError(f"references have [height, width] {sizes[0]}, and pictures {sizes[1]}: resize or crop them")
    return self._scores(candidates.images, self._references[candidates.which])


class Ensemble:
  """Several verifiers: minus the weighted sum of their ranks, or the weighted sum of their scores scaled to [0, 1].

  Both are relative to the candidates of the same prompt.
  """

  def __init__(self, verifiers: Sequence[Callable], weights: Sequence[float] | None = None, mode: str = "rank"):
    if mode not in MODES:
      raise ValueError(f"ensemble={quote(mode)} must be one of {', '.join(MODES)}")
    self._weights = [1.0] * len(verifiers) if weights is None else [float(w) for w in weights]
    if not verifiers or len(self._weights) != len(verifiers) or not np.isfinite(self._weights).all():
      raise ValueError(f"an ensemble of {len(verifiers)} verifiers needs as many finite weights, got {weights!r:.80}")
    self._verifiers, self._mode = list(verifiers), mode
    self.needs_images = any(getattr(v, "needs_images", True) for v in verifiers)

  def __call__(self, candidates: "Candidates") -> np.ndarray:
    """See the module."""
    total = np.zeros(len(candidates.ids))
    for verifier, weight in zip(self._verifiers, self._weights):
      scores = np.asarray(verifier(candidates), np.float64)
      for prompt in np.unique(candidates.which):
        rows = np.flatnonzero(candidates.which == prompt)
        of_prompt = scores[rows]
        if self._mode == "rank":
          ranks = np.empty(len(rows))
          ranks[np.argsort(-of_prompt, kind="stable")] = np.arange(len(rows))
          total[rows] -= weight * ranks
        else:
          extent = np.ptp(of_prompt)
          total[rows] += weight * (of_prompt - of_prompt.min()) / (extent if extent > 0 else 1.0)
    return total


_REFERENCES = ("psnr", "lpips", "dreamsim", "dinov2")
NAMES = ("clip", "likelihood", "step_likelihood", "top1", "aesthetic", "scenes", *_REFERENCES)


def make(
  verifier: Any, *, weights: str | None = None, references: Any = None, ensemble: str = "rank"
) -> Callable[["Candidates"], Any]:
  """Returns a verifier.

  Args:
    verifier: one of NAMES; a function of search.Candidates; a sequence of these, or {one of these: its weight}, for an
      ensemble.
    weights: folder with the networks.
    references: images [prompts, h, w, 3], uint8 or float in [-1, 1], to which "psnr", "lpips", "dreamsim" and "dinov2"
      compare.
    ensemble: "rank" or "weighted", see Ensemble.

  Raises:
    ValueError: an unknown name, or an argument or a network is missing; the line names it.
  """
  if isinstance(verifier, Mapping):
    parts = [make(v, weights=weights, references=references) for v in verifier]
    return Ensemble(parts, list(verifier.values()), ensemble)
  if isinstance(verifier, Sequence) and not isinstance(verifier, str):
    return Ensemble([make(v, weights=weights, references=references) for v in verifier], None, ensemble)
  if callable(verifier):
    return verifier
  if verifier in ("likelihood", "step_likelihood"):
    return Likelihood(verifier == "step_likelihood")
  if verifier == "scenes":
    return Scenes()
  networked: dict[str, Callable] = {"clip": Clip, "top1": Top1, "aesthetic": Aesthetic}
  if verifier in networked:
    return networked[verifier](weights)
  if verifier in _REFERENCES:
    return Reference(verifier, references, weights)
  raise ValueError(f"verifier={quote(verifier)} must be one of {', '.join(NAMES)}, or a function of the candidates")
