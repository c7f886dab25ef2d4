"""GPUs that are only described: XLA's compiler needs none."""

import re

import jax
from jax.experimental import topologies

# An H100 SXM as xla.gpu.GpuTargetConfigProto, by NVIDIA's data sheet and CUDA's device query.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
OPTIONS = {"xla_gpu_enable_triton_gemm": False}  # of the compiler: Triton's products are chosen by timing them on a GPU


def devices(topology: str) -> list[jax.Device]:
  """Returns the GPUs of h100:N, in one machine joined by NVLink.

  Raises:
    ValueError: another topology, or the GPU compiler is missing.
  """
  if not re.fullmatch("h100:[1-9][0-9]{0,3}", topology):
    raise ValueError(f"topology={topology}: give the number of GPUs, h100:8")
  count = topology.partition(":")[2]
  try:
    found = topologies.get_topology_desc("", "cuda", target_config=_H100, topology=f"1x1x{count}")
  except (NotImplementedError, RuntimeError) as e:  # without the plugin, and JAX's own errors
    raise ValueError(f'the GPU compiler is missing or cannot start: pip install "flextok-jax[cuda]" ({e})') from e
  return list(found.devices)
