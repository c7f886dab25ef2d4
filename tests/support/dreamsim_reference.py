"""Distances and embeddings of the dreamsim package for random weights; writes the numbers that tests compare with.

python -m tests.support.dreamsim_reference

Needs torch, torchvision, peft and dreamsim, which the library does not use. Weights and images come from seeds.
"""

from collections.abc import Iterator
import json
from pathlib import Path
import tempfile
from unittest import mock

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

STORED = Path(__file__).parent / "data" / "dreamsim.npz"
DEPTH = 12  # the package takes the twelfth block's output
WIDTH = 128
RANK = 4
BACKBONE, LORA = "backbone.safetensors", "dino_vitb16_single_lora"


def weights() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns the tensors of a small DINO with facebookresearch's names, and of its LoRA with peft's names."""
  rng = np.random.default_rng(0)
  normal = lambda deviation, *shape: rng.normal(0, deviation, shape).astype(np.float32)
  linear = lambda name, *shape: {
    f"{name}.weight": normal(np.prod(shape[1:]) ** -0.5, *shape),
    f"{name}.bias": normal(0.1, shape[0]),
  }
  norm = lambda name: {f"{name}.weight": 1 + normal(0.1, WIDTH), f"{name}.bias": normal(0.1, WIDTH)}
  backbone = linear("patch_embed.proj", WIDTH, 3, 16, 16) | norm("norm")
  backbone |= {"cls_token": normal(0.2, 1, 1, WIDTH), "pos_embed": normal(0.2, 1, 1 + 14 * 14, WIDTH)}
  lora = {}
  for i in range(DEPTH):
    name = f"blocks.{i}."
    backbone |= norm(name + "norm1") | norm(name + "norm2")
    backbone |= linear(name + "attn.qkv", 3 * WIDTH, WIDTH) | linear(name + "attn.proj", WIDTH, WIDTH)
    backbone |= linear(name + "mlp.fc1", 4 * WIDTH, WIDTH) | linear(name + "mlp.fc2", WIDTH, 4 * WIDTH)
    name = f"base_model.model.extractor_list.0.model.{name}attn.qkv.lora_"
    lora[name + "A.weight"] = normal(WIDTH**-0.5, RANK, WIDTH)
    lora[name + "B.weight"] = normal(2, 3 * WIDTH, RANK)
  return backbone, lora


def write(folder: Path):
  """Writes BACKBONE and LORA in the form that load_dreamsim reads."""
  backbone, lora = weights()
  (folder / LORA).mkdir()
  save_file(backbone, folder / BACKBONE)
  save_file(lora, folder / LORA / "adapter_model.safetensors")
  config = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 0.5,
    "lora_dropout": 0.3,
    "bias": "none",
    "target_modules": ["qkv"],
    "fan_in_fan_out": False,
    "modules_to_save": None,
  }
  (folder / LORA / "adapter_config.json").write_text(json.dumps(config))


def images() -> np.ndarray:
  """Returns pairs that differ in grain, in brightness and entirely: uint8 [2, 3, 150, 280, 3]."""
  rng = np.random.default_rng(0)
  a, other = rng.uniform(size=(2, 3, 150, 280, 3))
  a[1] = np.linspace(0, 1, 280)[:, None]
  b = np.stack([a[0] + rng.normal(0, 0.2, a[0].shape), a[1] * 0.8, other[2]])
  return np.round(255 * np.stack([a, b]).clip(0, 1)).astype(np.uint8)


def measure() -> tuple[np.ndarray, np.ndarray]:
  """Returns the package's distances [3] and its embeddings [3, WIDTH] of the first images."""
  from dreamsim import dreamsim
  from dreamsim.feature_extraction.vision_transformer import VisionTransformer
  import torch

  network = VisionTransformer(embed_dim=WIDTH, depth=DEPTH, num_heads=WIDTH // 64, qkv_bias=True)
  for module in network.modules():
    if isinstance(module, torch.nn.LayerNorm):
      module.eps = 1e-6
  network.load_state_dict({name: torch.from_numpy(x) for name, x in weights()[0].items()})
  with tempfile.TemporaryDirectory() as folder, mock.patch("torch.hub.load", lambda *_: network):
    write(Path(folder))
    torch.save({"student": dict(_unused_head(torch.zeros(1)))}, Path(folder) / "dino_vitb16_pretrain.pth")
    model, preprocess = dreamsim(device="cpu", cache_dir=folder, dreamsim_type="dino_vitb16")
  prepared = [torch.cat([preprocess(Image.fromarray(image)) for image in batch]) for batch in images()]
  return model(*prepared).numpy(), model.embed(prepared[0]).numpy()


def _unused_head(tensor) -> Iterator[tuple]:
  """Yields the parts of DINO's head that the package reads but does not use for the cls token."""
  for layer in (0, 2, 4):
    yield from ((f"module.head.mlp.{layer}.{kind}", tensor) for kind in ("weight", "bias"))
  yield "module.head.last_layer.weight", tensor


def main():
  STORED.parent.mkdir(exist_ok=True)
  distances, embeddings = measure()
  np.savez(STORED, distances=distances, embeddings=embeddings)


if __name__ == "__main__":
  main()
