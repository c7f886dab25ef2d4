"""The networks of metrics, from weights in one folder.

Nothing is downloaded: a metric whose network has no weights raises an error that names the file to get. All networks
take images [b, h, w, 3] in [0, 1] and are jax.tree_util.Partial: pytrees, which compiled functions take as arguments.
"""

from collections.abc import Callable, Sequence
import os
from pathlib import Path

import jax
from jax.tree_util import Partial
import numpy as np

from flextok_jax.data.text import CLIPTokenizer
from flextok_jax.models.perception import clip as clip_model
from flextok_jax.models.perception import vit
from flextok_jax.models.perception.dreamsim import DreamSim
from flextok_jax.models.perception.inception import FIDInception
from flextok_jax.models.perception.lpips import LPIPS
from flextok_jax.weights.perception.clip import load_clip
from flextok_jax.weights.perception.dreamsim import load_dreamsim
from flextok_jax.weights.perception.inception import load_inception
from flextok_jax.weights.perception.lpips import load_lpips
from flextok_jax.weights.perception.vit import load_vit

_CONVERT = "converted by python -m flextok_jax.convert SOURCE TARGET"
# Name in the weights' folder, of a .safetensors or .npz file or of a folder: what to put there.
SOURCES = {
  "inception": f"pt_inception-2015-12-05-6726825d.pth of pytorch-fid's releases, {_CONVERT}",
  "lpips_alex": f"the state_dict of lpips.LPIPS(net='alex'), or torchvision's alexnet-owt-7be5be79.pth, {_CONVERT}, "
  "with the package's weights/v0.1/alex.pth as lpips_alex_heads beside it",
  "lpips_vgg": f"the state_dict of lpips.LPIPS(net='vgg'), or torchvision's vgg16-397923af.pth, {_CONVERT}, with the "
  "package's weights/v0.1/vgg.pth as lpips_vgg_heads beside it",
  "dreamsim": "a folder in peft's format, the dino_vitb16_single_lora that the dreamsim package downloads, with "
  "facebook/dino-vitb16 as dreamsim_backbone beside it",
  "dinov2": "a Hugging Face folder such as facebook/dinov2-base",
  "clip": "a Hugging Face folder with tokenizer.json, such as openai/clip-vit-large-patch14",
  "aesthetic": "a linear or MLP head on the features of clip, such as LAION's sac+logos+ava1-l14-linearMSE.pth for "
  f"openai/clip-vit-large-patch14, {_CONVERT}",
  "classifier": "a Hugging Face folder such as facebook/dinov2-large-imagenet1k-1-layer",
}
_TEXTS = 256  # per batch
_ENDINGS = (".safetensors", ".npz", "")


def find(folder: str | None, name: str, metric: str) -> str:
  """Returns the path of a network's weights in a folder.

  Raises:
    ValueError: they are missing; the line names the file to get.
  """
  if folder is None:
    raise ValueError(f"metric {metric!r} needs weights=DIR, a folder with {name}: {SOURCES[name]}")
  found = path_in(folder, name)
  if found is None:
    raise ValueError(f"metric {metric}: {folder} has no {name}.safetensors, .npz or folder: put there {SOURCES[name]}")
  return found


def inception(folder: str | None, metric: str) -> Partial:
  """Returns images -> {"pool" [b, 2048], "spatial" [b, 2023], "logits" [b, 1008]}."""
  return _partial(FIDInception().apply, load_inception(find(folder, "inception", metric)))


def lpips(folder: str | None, net: str) -> Partial:
  """Returns (images, images) -> [b], LPIPS with net "alex" or "vgg".

  Raises:
    ValueError: the file is for another net.
  """
  name = f"lpips_{net}"
  return _partial(LPIPS(net).apply, read_lpips(find(folder, name, name), net))


def read_lpips(path: str, net: str) -> dict:
  """Returns the parameters of LPIPS from a file, and from one beside it if that has the heads.

  Raises:
    ValueError: the file is for another net than `net`.
  """
  found, params = load_lpips(path, path_in(os.path.dirname(path), f"lpips_{net}_heads"))
  if found != net:
    raise ValueError(f"{path} has the weights of {found!r}, not of {net!r}")
  return params


def dreamsim(folder: str | None) -> Partial:
  """Returns (images, images) -> [b], DreamSim with one branch."""
  lora = find(folder, "dreamsim", "dreamsim")
  backbone = path_in(os.path.dirname(lora), "dreamsim_backbone")
  if backbone is None:
    raise ValueError(f"metric dreamsim: {folder} has no dreamsim_backbone: put there {SOURCES['dreamsim']}")
  sizes, params = load_dreamsim(backbone, lora)
  return _partial(DreamSim(vit.ViT(**sizes)).apply, params)


def similarity(folder: str | None) -> Partial:
  """Returns (images, images) -> [b], the cosine similarity of their DINOv2 class tokens."""
  class_tokens, params = _dinov2(find(folder, "dinov2", "dinov2"))

  def cosine(variables, a, b):
    x, y = (class_tokens(variables, images) for images in (a, b))
    x, y = (x / jax.numpy.linalg.norm(x, axis=1, keepdims=True) for x in (x, y))
    return (x * y).sum(1)

  return _partial(cosine, params)


def features(folder: str | None) -> dict[str, Partial]:
  """Returns {name: images -> [b, d]} of the networks that a folder has: class tokens of "dinov2", vectors of "clip"."""
  found = {}
  if folder is not None and (path := path_in(folder, "dinov2")) is not None:
    found["dinov2"] = _partial(*_dinov2(path))
  if folder is not None and path_in(folder, "clip") is not None:
    found["clip"] = clip(folder, "clip")[0]
  return found


def classifier(folder: str | None, metric: str) -> Partial:
  """Returns images -> logits [b, classes], of a DINOv2 with a linear head.

  Raises:
    ValueError: the model has no head.
  """
  path = find(folder, "classifier", metric)
  sizes, params = load_vit(path)
  if not sizes.get("num_classes"):
    raise ValueError(f"{path} has no classifier: put there {SOURCES['classifier']}")
  apply = vit.ViT(**sizes).apply

  def logits(variables, images):
    return apply(variables, vit.preprocess(images))["logits"]

  return _partial(logits, params)


def clip(folder: str | None, metric: str) -> tuple[Partial, Callable[[Sequence[str]], np.ndarray]]:
  """Returns images -> [b, d] and texts -> [n, d]: CLIP's features, of norm 1."""
  path = find(folder, "clip", metric)
  sizes, params = load_clip(path)
  tokenize = CLIPTokenizer(path, sizes["text"]["max_length"])
  model, size = clip_model.CLIP(**sizes), sizes["image"]["grid"] * sizes["image"]["patch_size"]
  images = _partial(
    lambda variables, x: model.apply(variables, clip_model.preprocess(x, size), method="image_features"), params
  )
  text = _partial(lambda variables, *ids: model.apply(variables, *ids, method="text_features"), params)
  compiled = jax.jit(lambda text, *ids: text(*ids))

  def encode(texts: Sequence[str]) -> np.ndarray:
    parts = [compiled(text, *tokenize(texts[i : i + _TEXTS])) for i in range(0, len(texts), _TEXTS)]
    return np.concatenate([np.asarray(x) for x in parts])

  return images, encode


def path_in(folder: str, name: str) -> str | None:
  """Returns the path of the file or folder with a name in a folder, whatever its ending, or None."""
  candidates = (Path(folder) / f"{name}{ending}" for ending in _ENDINGS)
  return next((os.fspath(path) for path in candidates if path.exists()), None)


def _dinov2(path: str) -> tuple[Callable, dict]:
  """Returns ((variables, images) -> class tokens [b, d], parameters) of a DINOv2."""
  sizes, params = load_vit(path)
  apply = vit.ViT(**sizes).apply

  def class_tokens(variables, images):
    return apply(variables, vit.preprocess(images))["cls"]

  return class_tokens, params


def _partial(fn: Callable, params: dict) -> Partial:
  """Returns fn({"params": params}, ...) with matmuls in float32, whatever the accelerator's default."""

  def highest(variables, *images):
    with jax.default_matmul_precision("highest"):
      return fn(variables, *images)

  return Partial(highest, {"params": params})
