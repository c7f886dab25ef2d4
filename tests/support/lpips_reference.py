"""Distances and gradients of the lpips package for random weights; writes the numbers that tests compare with.

python -m tests.support.lpips_reference

Needs torch, torchvision and lpips, which the library does not use. Weights and images come from seeds.
"""

from pathlib import Path

import numpy as np

from flextok_jax.models.perception import lpips

STORED = Path(__file__).parent / "data" / "lpips.npz"
STEP = 8  # distance between pixels whose gradients are stored


def weights(net: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns the tensors of torchvision's features and of the package's heads; activations keep about the same scale."""
  rng = np.random.default_rng(len(net))
  backbone, heads, fan_in = {}, {}, 3
  for scale, (_, convolutions) in enumerate(lpips.NETS[net]):
    for index, channels, kernel, _, _ in convolutions:
      deviation = (2 / (fan_in * kernel**2)) ** 0.5
      backbone[f"features.{index}.weight"] = rng.normal(0, deviation, (channels, fan_in, kernel, kernel))
      backbone[f"features.{index}.bias"] = rng.normal(0, 0.1, channels)
      fan_in = channels
    heads[f"lin{scale}.model.1.weight"] = rng.uniform(0, 2 / channels, (1, channels, 1, 1))
  as_float32 = lambda tensors: {name: x.astype(np.float32) for name, x in tensors.items()}
  return as_float32(backbone), as_float32(heads)


def images() -> np.ndarray:
  """Returns pairs that differ in grain, in brightness and entirely: [2, 3, 50, 66, 3] in [0, 1]."""
  rng = np.random.default_rng(0)
  a, other = rng.uniform(size=(2, 3, 50, 66, 3))
  a[1] = np.linspace(0, 1, 66)[:, None]
  b = np.stack([a[0] + rng.normal(0, 0.1, a[0].shape), a[1] * 0.8, other[2]])
  return np.stack([a, np.clip(b, 0, 1)]).astype(np.float32)


def distances(net: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the package's distances [3], and the gradients of their sum in the first images at every STEP-th pixel."""
  import lpips as package
  import torch

  model = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
  own = {}
  for name in model.state_dict():
    parts = name.split(".")
    own[name] = ".".join(["features", *parts[2:]]) if parts[0] == "net" else name.replace("lins.", "lin")
  tensors = {name: torch.from_numpy(x) for part in weights(net) for name, x in part.items()}
  model.load_state_dict({name: tensors.get(own[name], x) for name, x in model.state_dict().items()})
  a, b = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in images())
  a.requires_grad_()
  found = model(a, b, normalize=True)[:, 0, 0, 0]
  found.sum().backward()
  return found.detach().numpy(), a.grad.permute(0, 2, 3, 1).numpy()[:, ::STEP, ::STEP]


def main():
  arrays = {}
  for net in lpips.NETS:
    arrays[f"{net}/distances"], arrays[f"{net}/gradients"] = distances(net)
  STORED.parent.mkdir(exist_ok=True)
  np.savez(STORED, **arrays)


if __name__ == "__main__":
  main()
