"""Starting JAX's devices; and peak rates and memory of accelerators, by jax's device kind, from public data sheets."""

import dataclasses

import jax

from flextok_jax.core.errors import first_line

GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """A chip, or the part of a chip that is one device."""

  flops: float  # per second, dense bfloat16 matmuls
  memory: float  # bytes
  bandwidth: float  # of memory, bytes per second
  links: float  # bytes per second sent to neighbours over all links together
  axes: int  # of the torus of chips; a group along one axis has 1 / axes of the links; 1: switched, not a torus
  cores: int = 1  # per chip; each is a device, or all are one
  clock: float | None = None  # Hz; None: the compiler does not report cycles


# TPUs: cloud.google.com/tpu/docs (v4, v5p, v5e, v6e, tpu7x), "per chip". Links: half of the "bidirectional" bandwidth.
# Clock: peak FLOPs over the matrix units' FLOPs per cycle (2 per cell: 4 units of 128 x 128 per core; v6e, tpu7x: 4
# times as many). It agrees with the compiler's cycle estimates for large matmuls.
# GPUs: NVIDIA's data sheets of the SXM modules, dense; links: NVLink, one direction.
_CHIPS = {
  "TPU v4": Accelerator(275e12, 32 * GIB, 1228 * GB, 300 * GB, 3, cores=2, clock=275e12 / 2**18),
  "TPU v5 lite": Accelerator(197e12, 16 * GIB, 819 * GB, 200 * GB, 2, clock=197e12 / 2**17),
  "TPU v5": Accelerator(459e12, 95 * GIB, 2765 * GB, 600 * GB, 3, cores=2, clock=459e12 / 2**18),  # v5p
  "TPU v6 lite": Accelerator(918e12, 32 * GIB, 1638 * GB, 400 * GB, 2, clock=918e12 / 2**19),
  "TPU7x": Accelerator(2307e12, 192 * GIB, 7380 * GB, 600 * GB, 3, cores=2, clock=2307e12 / 2**20),
  "NVIDIA A100-SXM4-40GB": Accelerator(312e12, 40 * GB, 1555 * GB, 300 * GB, 1),
  "NVIDIA A100-SXM4-80GB": Accelerator(312e12, 80 * GB, 2039 * GB, 300 * GB, 1),
  "NVIDIA H100 80GB HBM3": Accelerator(989e12, 80 * GB, 3350 * GB, 450 * GB, 1),
  "NVIDIA H200": Accelerator(989e12, 141 * GB, 4800 * GB, 450 * GB, 1),
}


def start() -> None:
  """Starts JAX's devices, unless they have started already.

  Raises:
    OSError: they cannot start.
  """
  try:
    jax.devices()
  except Exception as e:  # a RuntimeError, or an AssertionError without text if a platform's package is missing
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    asked = f"JAX_PLATFORMS={platforms}: " if platforms else ""
    raise OSError(
      f"{asked}JAX cannot start its devices ({first_line(e, 300)}); install JAX for this accelerator, or set "
      "JAX_PLATFORMS=cpu"
    ) from e


def memory(device: jax.Device) -> float | None:
  """Returns the bytes of memory that a program can use on a device: what JAX reserves, or the data sheet's figure.

  None: they are unknown, or (on a CPU) shared with everything else.
  """
  if device.platform == "cpu":
    return None
  try:
    reserved = (device.memory_stats() or {}).get("bytes_limit")
  except Exception:  # a device that is only described, or one that keeps no statistics
    reserved = None
  chip = known(device)
  return reserved or (None if chip is None else chip.memory)


def known(device: jax.Device) -> Accelerator | None:
  """Returns the peak rates of a device, or None if they are unknown (a CPU, another kind).

  A device may be a part of a chip: each core of a TPU7x is one, both cores of a v5p are one.
  """
  chip = _CHIPS.get(device.device_kind)
  if chip is None:
    return None
  share = getattr(device, "num_cores", 1) / chip.cores
  if share >= 1:
    return chip
  parts = {name: getattr(chip, name) * share for name in ("flops", "memory", "bandwidth", "links")}
  return dataclasses.replace(chip, **parts, cores=1)
