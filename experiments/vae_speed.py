"""What would a faster VAE on a CPU have to make faster?

python -m experiments.vae_speed [--rounds=3] [--parts=encode,decode,conv,diffusers]

The VAE of the released size with random weights, float32, one image of 256 px: as it is; with GroupNorms that reduce
each channel before the groups; and without GroupNorms, which bounds what any other way to compute them could save. Then
single 3x3 convolutions of its levels: as the backend computes them, as nine shifted products, and by Winograd's
F(2x2, 3x3). "diffusers" compares with AutoencoderKL of that package on PyTorch, with the same weights. All ways
alternate within each round. Times are medians, of the wall clock and of the processor, which other work on the machine
disturbs less.
"""

from collections.abc import Callable, Mapping
import functools
import statistics
import tempfile
import time
from typing import Any

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax import cli
from flextok_jax.config import with_fields
from flextok_jax.configs import vae as vae_config
from flextok_jax.models.vae.autoencoder import AutoencoderKL
from flextok_jax.weights import saving

PARTS = ("encode", "decode", "conv", "diffusers")
LAYERS = ((64, 512), (128, 256), (256, 128))  # size and channels of the features of convolutions


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_integer("rounds", 3, "Of all ways, after one that is not timed.", 1, flag_values=values)
  flags.DEFINE_list("parts", ["encode", "decode", "conv"], f"What to time, of {', '.join(PARTS)}.", flag_values=values)


def by_channel(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
  """Computes GroupNorms from mean and variance of each channel; a flax interceptor."""
  norm = context.module
  if not isinstance(norm, nn.GroupNorm):
    return function(*args, **kwargs)
  (x,), params = args, norm.variables["params"]
  batch, _, _, channels = x.shape
  mean = x.mean((1, 2))
  variance = jnp.square(x - mean[:, None, None]).mean((1, 2))
  mean, variance = (s.reshape(batch, norm.num_groups, -1) for s in (mean, variance))
  group = mean.mean(-1, keepdims=True)
  variance = (variance + jnp.square(mean - group)).mean(-1, keepdims=True)
  scale, group = (
    jnp.broadcast_to(s, mean.shape).reshape(batch, channels) for s in (jax.lax.rsqrt(variance + norm.epsilon), group)
  )
  scale = scale * params["scale"]
  return x * scale[:, None, None] + (params["bias"] - group * scale)[:, None, None]


def without(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
  """Leaves GroupNorms out; a flax interceptor."""
  return args[0] if isinstance(context.module, nn.GroupNorm) else function(*args, **kwargs)


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [b, h, w, c], kernel [3, 3, c, d] -> [b, h, w, d]."""
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """As convolution, by nine products."""
  h, w = x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))


def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """As convolution for even h and w, by 16 products of a quarter of the positions (Lavin and Gray 2016)."""
  b, h, w, c = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  of_kernel = jnp.asarray([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
  kernels = jnp.einsum("ia,jb,abcd->ijcd", of_kernel, of_kernel, kernel)
  into = lambda s: (s[0] - s[2], s[1] + s[2], s[2] - s[1], s[1] - s[3])
  out_of = lambda s: (s[0] + s[1] + s[2], s[1] - s[2] - s[3])
  rows = into([jax.lax.slice_in_dim(padded, i, i + h - 1, 2, axis=1) for i in range(4)])
  parts = [into([jax.lax.slice_in_dim(row, j, j + w - 1, 2, axis=2) for j in range(4)]) for row in rows]
  products = [[part.reshape(-1, c) @ kernels[i, j] for j, part in enumerate(row)] for i, row in enumerate(parts)]
  columns = [out_of([products[i][j] for i in range(4)]) for j in range(4)]
  found = jnp.stack([jnp.stack(out_of([column[i] for column in columns])) for i in range(2)])  # [2, 2, b h/2 w/2, d]
  return found.reshape(2, 2, b, h // 2, w // 2, -1).transpose(2, 3, 0, 4, 1, 5).reshape(b, h, w, -1)


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
  """Returns the median seconds of wall clock and processor of each way; all ways run once per round."""
  times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
  for _ in range(rounds):
    for way, run in ways.items():
      wall, processor = time.perf_counter(), time.process_time()
      run()
      times[way].append((time.perf_counter() - wall, time.process_time() - processor))
  return {
    way: (statistics.median(w for w, _ in found), statistics.median(p for _, p in found))
    for way, found in times.items()
  }


def beside_diffusers(vae: AutoencoderKL, params: Any, inputs: Mapping[str, jax.Array], rounds: int) -> None:
  """Prints the times of this package and of diffusers to encode and decode, and the largest difference."""
  import diffusers  # not needed otherwise
  import torch

  with tempfile.TemporaryDirectory() as folder:
    config = with_fields(vae_config.get_config("c16"), {"vae.scaling_factor": 1.0})
    saving.save_official(folder, config, {"vae": params["params"]})
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
  calls = {"encode": lambda x: theirs.encode(x).latent_dist.mode(), "decode": lambda x: theirs.decode(x).sample}
  for part, x in inputs.items():
    own = jax.jit(functools.partial(vae.apply, method=part)).lower(params, x).compile()
    given = torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())

    def ours(own: Any = own, x: jax.Array = x) -> np.ndarray:
      return np.asarray(jax.tree.leaves(own(params, x))[0])

    def other(part: str = part, given: Any = given) -> np.ndarray:
      with torch.inference_mode():
        return calls[part](given).numpy().transpose(0, 2, 3, 1)

    gap = np.abs(ours() - other()).max()
    times = alternate({"this package": ours, "diffusers": other}, rounds)
    for way, (wall, processor) in times.items():
      print(f"{part:14} {way:12} {wall:7.3f} s, processor {processor:7.3f} s; largest difference {gap:.1e}", flush=True)


def compare(name: str, ways: dict[str, Any], *args: Any, rounds: int) -> None:
  """Prints the times of each way, its largest difference from the first, and XLA's count of FLOPs and bytes."""
  compiled = {way: jax.jit(function).lower(*args).compile() for way, function in ways.items()}
  outputs = {way: np.asarray(jax.tree.leaves(run(*args))[0]) for way, run in compiled.items()}
  expected = outputs[next(iter(ways))]
  times = alternate({way: lambda run=run: jax.block_until_ready(run(*args)) for way, run in compiled.items()}, rounds)
  for way, run in compiled.items():
    wall, processor = times[way]
    cost, gap = run.cost_analysis(), np.abs(outputs[way] - expected).max()
    count = f"{cost['flops'] / 1e9:.1f} GFLOP, {cost['bytes accessed'] / 1e9:.2f} GB"
    print(f"{name:14} {way:12} {wall:7.3f} s, processor {processor:7.3f} s; {count}; differs by {gap:.1e}", flush=True)


def main(values: flags.FlagValues):
  """Prints a line for each way."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  vae = AutoencoderKL(16, (128, 256, 512, 512))
  inputs = {"encode": draw(1, 256, 256, 3), "decode": draw(1, 32, 32, 16)}

  def init(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
    return draw(*x.shape) * np.prod(x.shape[:-1]) ** -0.5 + (path[-1].key == "scale")

  shapes = nn.unbox(jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
  params = jax.tree_util.tree_map_with_path(init, shapes)

  def intercepted(method: str, interceptor: Any) -> Any:
    def run(params: Any, x: jax.Array) -> Any:
      with nn.intercept_methods(interceptor):
        return vae.apply(params, x, method=method)

    return run

  with jax.default_matmul_precision("highest"):
    for part in values.parts:
      if part == "diffusers":
        beside_diffusers(vae, params, inputs, values.rounds)
        continue
      if part == "conv":
        for size, channels in LAYERS:
          ways = {"convolution": convolution, "shifted": shifted, "winograd": winograd}
          x, kernel = draw(1, size, size, channels), draw(3, 3, channels, channels) / (3 * channels**0.5)
          compare(f"{size} px, {channels}", ways, x, kernel, rounds=values.rounds)
        continue
      plain = lambda function, args, kwargs, context: function(*args, **kwargs)
      norms = {"as it is": plain, "by channel": by_channel, "no norms": without}
      compare(
        part, {way: intercepted(part, norm) for way, norm in norms.items()}, params, inputs[part], rounds=values.rounds
      )


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
