"""Features of a few images computed by the original networks with random weights, in PyTorch.

python -m tests.support.torch_inception rewrites FEATURES; it needs torch, pytorch-fid and torch-fidelity.
"""

from pathlib import Path
from unittest import mock

import numpy as np

from experiments.benchmark_features import random_tensors

FEATURES = Path(__file__).parent / "data" / "inception.npz"
SEED = 3  # for the weights


def some_images() -> np.ndarray:
  """Returns uint8 [6, 80, 96, 3]: three images of noise, three of smooth colours."""
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (3, 80, 96, 3))
  down, right = np.mgrid[:80, :96] / 20
  smooth = [np.sin(down[..., None] * a + right[..., None] * b) for a, b in rng.uniform(0.2, 1, (3, 2, 3))]
  return np.concatenate([noise, np.round(127.5 + 127 * np.stack(smooth))]).astype(np.uint8)


def originals() -> dict[str, np.ndarray]:
  """Returns {"pytorch_pool": [6, 2048], for all images by pytorch-fid; "pool": [2, 2048], "spatial": [2, 2023],
  "logits": [2, 1008], for the first and the last image by torch-fidelity}, float32."""
  from pytorch_fid import inception
  import torch
  from torch_fidelity import feature_extractor_inceptionv3 as fidelity

  tensors = {name: torch.from_numpy(tensor) for name, tensor in random_tensors(SEED).items()}
  load = lambda *args, **kwargs: tensors
  with mock.patch.object(inception, "load_state_dict_from_url", load):
    pytorch = inception.InceptionV3().eval()
  with mock.patch.object(fidelity, "load_state_dict_from_url", load):
    tensorflow = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
  spatial = []
  tensorflow.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
  images = torch.from_numpy(some_images()).permute(0, 3, 1, 2)
  with torch.no_grad():
    pytorch_pool = pytorch(images.float() / 255)[0][:, :, 0, 0]
    pool, logits = tensorflow(images[[0, -1]])
  found = dict(
    pytorch_pool=pytorch_pool, pool=pool, logits=logits, spatial=spatial[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
  )
  return {name: tensor.numpy() for name, tensor in found.items()}


if __name__ == "__main__":
  FEATURES.parent.mkdir(exist_ok=True)
  np.savez_compressed(FEATURES, **originals())
