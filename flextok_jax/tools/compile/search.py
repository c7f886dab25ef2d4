"""Search for the mesh, remat policy and batch that fit and are the fastest by the estimate."""

from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from flextok_jax import stages
from flextok_jax.models import layers
from flextok_jax.parallel import sharding
from flextok_jax.tools.compile.report import CompileReport

_TENSOR, _FSDP = (
  (1, 2, 4, 8),
  (1, 4, 16, 64),
)  # sizes that are tried, besides "fsdp" over all devices that "tensor" leaves
_GAIN = 0.01  # the batch is doubled while the time per image falls by this share


def meshes(config: ConfigDict, devices: int) -> Iterator[dict[str, int]]:
  """Yields mesh axis sizes that divide the devices and, for "tensor", the heads and hidden units of every part."""
  counts = stages.divided_by_tensor(config).values()
  for tensor in _TENSOR:
    if devices % tensor or any(count % tensor for count in counts) or (tensor > 1 and not counts):
      continue
    rest = devices // tensor
    for fsdp in sorted({size for size in (*_FSDP, rest) if rest % size == 0}):
      yield {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}


def search(
  config: ConfigDict, job: str, devices: int, batch: int, try_one: Callable[[ConfigDict, int], CompileReport]
) -> list[CompileReport]:
  """Compiles meshes x remat policies x batches, which are doubled from `batch` on while the time per image falls.

  Args:
    config: of the model.
    job: a key of jobs.STAGES.
    devices: number of devices.
    batch: first number of images per device.
    try_one: compiles a config with a number of images per device; returns a report even if that does not fit.

  Returns:
    All reports, ordered by estimated time per image; those that do not fit come last.
  """
  reports: list[CompileReport] = []
  for mesh in meshes(config, devices):
    for remat in layers.REMATS if job == "train" else (config.remat,):
      tried = config.copy_and_resolve_references()
      tried.remat = remat
      tried.mesh.update(mesh)
      reports += _grow(tried, batch, try_one)
  return sorted(reports, key=_image_seconds)


def _grow(config: ConfigDict, batch: int, try_one) -> Iterator[CompileReport]:
  best = float("inf")
  while True:
    report = try_one(config, batch)
    yield report
    seconds = _image_seconds(report)
    if seconds > (1 - _GAIN) * best:
      return
    best, batch = seconds, 2 * batch


def _image_seconds(report: CompileReport) -> float:
  return 1 / report.images_per_second if report.fits else float("inf")


def format_search(reports: list[CompileReport]) -> str:
  """Returns a line for each report."""
  lines = []
  for r in reports:
    s = r.settings
    mesh = " x ".join(str(s["mesh"][axis]) for axis in sharding.AXES)
    line = f"mesh {mesh}, remat {s['remat']}, {s['per_device_batch']:g} images per device"
    line += f": {r.memory['total'] / 1e9:.1f} GB"
    if r.fits:
      line += f", MFU {r.mfu:.1%} (roofline {r.mfu_roofline:.1%}, {r.bound}), {r.images_per_second:.0f} images/s"
    lines.append(line if r.fits else f"{line}, does not fit")
  return "\n".join(lines)
