"""Weights of DreamSim with one branch: a vision transformer and the LoRA (Hu et al. 2021) that tunes it."""

import os
import re

from einops import rearrange
import numpy as np

from flextok_jax.core import literals, tensor_file
from flextok_jax.weights.perception import files
from flextok_jax.weights.perception.vit import load_vit

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_SUPPORTED = {  # fields of peft's configuration and their only supported values
  "bias": "none",
  "fan_in_fan_out": False,
  "use_rslora": False,
  "use_dora": False,
  "rank_pattern": {},
  "alpha_pattern": {},
}


def load_dreamsim(backbone: str | os.PathLike, lora: str | os.PathLike) -> tuple[dict, dict]:
  """Loads DreamSim and merges its LoRA into the weights.

  Args:
    backbone: the vision transformer that was tuned, as load_vit reads it: facebook/dino-vitb16 for "dino_vitb16", or a
      file made of facebookresearch's dino_vitbase16_pretrain.pth.
    lora: a folder in peft's format, such as the dino_vitb16_single_lora that the dreamsim package downloads.

  Returns:
    (sizes, params): of DreamSim(ViT(**sizes)); parameters are float32.

  Raises:
    FileNotFoundError: a file does not exist, or only in a format that is not supported.
    ValueError: a damaged, foreign or unsupported file; the line names what is wrong.
  """
  sizes, params = load_vit(backbone)
  kernels = params["blocks"]["attention"]["qkv"]["kernel"]  # [depth, d, 3, heads, d / heads]
  for kernel, update in zip(kernels, _updates(os.fspath(lora), len(kernels), kernels.shape[1])):
    kernel += rearrange(update, "(n h e) d -> d n h e", n=kernel.shape[1], h=kernel.shape[2])
  # DreamSim compares the cls token before the last norm, centred and scaled: a norm without weights of its own.
  params["norm"] = {"scale": np.ones(sizes["width"], np.float32), "bias": np.zeros(sizes["width"], np.float32)}
  return sizes, {"vit": params}


def _updates(folder: str, depth: int, width: int) -> list[np.ndarray]:
  """Returns the change of each block's qkv weights [3 * width, width]."""
  for name in (CONFIG, WEIGHTS):
    if not os.path.isfile(os.path.join(folder, name)):
      raise FileNotFoundError(
        f"no {name} in {folder}: give a folder in peft's format; an adapter_model.bin there is "
        f"converted by python -m flextok_jax.convert SOURCE {WEIGHTS}"
      )
  path = os.path.join(folder, CONFIG)
  with open(path, "rb") as f:
    fields = literals.parse_json(f.read(literals.MAX_TEXT + 1), path)
  for name, value in _SUPPORTED.items():
    if (fields.get(name) or value) != value:
      raise ValueError(f"{path}: {name} {literals.quote(fields[name])} is not supported, only {value!r} is")
  rank, alpha = fields.get("r"), fields.get("lora_alpha")
  if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= width:
    raise ValueError(f"{path}: r must be a whole number from 1 to {width}, got {literals.quote(rank)}")
  if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 2**16:
    raise ValueError(f"{path}: lora_alpha must lie between 0 and {2**16}, got {literals.quote(alpha)}")

  path = os.path.join(folder, WEIGHTS)
  given = files.read(path)
  tensors = {re.sub(r"^.*?\bblocks\.", "blocks.", name).replace(".default.", "."): x for name, x in given.items()}
  if len(tensors) < len(given):
    raise ValueError(f"{path} tunes several networks: give the LoRA of a DreamSim with one branch")
  names = [[f"blocks.{i}.attn.qkv.lora_{part}.weight" for part in "AB"] for i in range(depth)]
  tensor_file.check_names(path, tensors, sum(names, []))
  for pair in names:
    for name, shape in zip(pair, ((rank, width), (3 * width, rank))):
      if tensors[name].shape != shape:
        raise ValueError(f"{path}: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
  return [alpha / rank * tensors[b] @ tensors[a] for a, b in names]
