"""Per-image measures by name: how a picture differs from its original, for reports, studies and adaptive lengths."""

from collections.abc import Callable, Sequence

from jax.tree_util import Partial

from flextok_jax.evals.metrics import image as metrics
from flextok_jax.ops import distances
from flextok_jax.weights.perception import networks


def _of_unit_range(distance: distances.Distance) -> Callable:
  return lambda a, b: distance(2 * a - 1, 2 * b - 1)


# A pytree, so that a network's weights are arguments of a compiled function and not constants in it; called with
# (a, b), both float32 [batch, h, w, 3] in [0, 1], b of 8 bits where it stands for a stored picture, it gives [batch].
Measure = Partial

UNITS = {
  "psnr": "PSNR dB",
  "ssim": "SSIM",
  "mae": "MAE",
  "mse": "MSE",
  "lpips_alex": "LPIPS alex",
  "lpips_vgg": "LPIPS vgg",
  "dreamsim": "DreamSim",
  "dinov2": "DINOv2 sim",
  "rfid": "rFID",
}
DECIMALS = {"psnr": 2, "rfid": 2}  # in tables; the others have 4
BETTER_HIGH = ("psnr", "ssim", "dinov2")  # of the others less is better
PLAIN = metrics.METRICS | {name: _of_unit_range(f) for name, f in distances.DISTANCES.items()}
NETWORKS = {
  "lpips_alex": lambda folder: networks.lpips(folder, "alex"),
  "lpips_vgg": lambda folder: networks.lpips(folder, "vgg"),
  "dreamsim": networks.dreamsim,
  "dinov2": networks.similarity,
}
NAMES = (*PLAIN, *NETWORKS)


def make(names: Sequence[str], weights: str | None = None) -> dict[str, Measure]:
  """Returns measures by name, those of networks with their weights.

  Args:
    names: of NAMES.
    weights: folder with the weights of networks, see weights/perception/networks.py.

  Raises:
    ValueError: an unknown name, or a network without weights.
  """
  for name in names:
    if name not in NAMES:
      raise ValueError(f"unknown metric {name!r}: one of {', '.join(NAMES)}")
  return {name: NETWORKS[name](weights) if name in NETWORKS else Partial(PLAIN[name]) for name in names}
