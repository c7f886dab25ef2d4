"""The job "repa" of python -m flextok_jax.benchmark: what REPA adds to a training step on latents, in one run.

Three ways of a step: "off", without it; "features", where the batch brings the teacher's features, as from shards;
"teacher", where a DINOv2 of random weights computes them from the images first.
"""

from collections.abc import Iterable
import statistics

from flax.core.meta import unbox
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.core import flops, timing
from flextok_jax.models.perception.vit import ViT
from flextok_jax.parallel import sharding
from flextok_jax.stages import repa
from flextok_jax.tools.benchmark import jobs as benchmark_jobs
from flextok_jax.tools.benchmark.jobs import Compute, Row
from flextok_jax.training import teacher

WAYS = ("off", "features", "teacher")
_DINOV2 = {384: (12, False), 768: (12, False), 1024: (24, False), 1536: (40, True)}  # width: depth, gated MLP


def teacher_sizes(width: int) -> dict:
  """Returns the sizes of the DINOv2 of a width, as weights/perception/vit.py reads them.

  Raises:
    ValueError: no DINOv2 has this width.
  """
  if width not in _DINOV2:
    raise ValueError(f"repa.features {width} is the width of no DINOv2: they have {', '.join(map(str, _DINOV2))}")
  depth, gated = _DINOV2[width]
  hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8 if gated else 4 * width
  return dict(
    patch_size=14,
    grid=37,
    width=width,
    depth=depth,
    head_dim=64,
    mlp_hidden=hidden,
    gated_mlp=gated,
    activation="silu" if gated else "gelu",
    layer_scale=True,
  )


def teacher_flops(sizes: dict, grid: int, batch_size: int) -> int:
  """Returns the FLOPs of a teacher of these sizes for images of grid x grid patches."""
  vit, side = ViT(**sizes, attention="xla"), grid * sizes["patch_size"]
  images = jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)
  params = unbox(jax.eval_shape(vit.init, jax.random.key(0), images))
  return flops.count(lambda params, images: vit.apply(params, images)["patches"], params, images)


class Benchmark(benchmark_jobs.Benchmark):
  """The jobs of a tokenizer, "repa" with them."""

  def compute(self, job: str) -> Compute:
    return super().compute("train" if job == "repa" else job)

  def run(self, job: str, num_tokens: int | None, repeats: int, limit: float) -> list[Row]:
    if job != "repa":
      return super().run(job, num_tokens, repeats, limit)
    path, size = "fast" if self.config.fast else "plain", self.batch_size
    config = self.config.copy_and_resolve_references()
    config.repa.weight = 0.0
    programs, shapes, inputs, counts, arrays = {}, {}, {}, {}, {}
    for way, bench in (
      ("off", Benchmark(config, (path,), size, True)),
      ("features", Benchmark(self.config, (path,), size, True)),
    ):
      (state, *inputs[way]), made = bench.prepare("train", None)
      fn, counts[way] = made[path]
      programs[way] = self._compiler(fn, (state, *inputs[way]), self.compute(job)[1], donated=True)
      shapes[way] = jax.eval_shape(lambda x: x, state)
      arrays |= _by_path(state)  # in the end those of the state with REPA, which has all of the other
      del state
    sizes = teacher_sizes(self.config.repa.features)
    features, images = self._features_fn(sizes), self._images()
    programs["teacher"] = programs["features"]
    counts["teacher"] = counts["features"] + teacher_flops(sizes, repa.teacher_grid(self.config), size)

    def step(way: str):
      own = "off" if way == "off" else "features"
      batch, key = inputs[own]
      if way == "teacher":
        batch = batch | {"teacher": features(images)}
      state = jax.tree.map_with_path(lambda path, _: arrays[jax.tree_util.keystr(path)], shapes[own])
      state, metrics = programs[way].run(state, batch, key)
      arrays.update(_by_path(state))
      return state, metrics

    runs = {way: lambda way=way: step(way) for way in WAYS}
    seconds = timing.time_rounds(runs, (), repeats, limit)
    return [
      Row(
        job=job,
        path=way,
        num_tokens=None,
        batch_size=size,
        latents=True,
        compute=self.compute(job),
        seconds=tuple(seconds[way]),
        compile_seconds=programs[way].seconds,
        program=programs[way].digest,
        flops=counts[way],
        xla_flops=timing.xla_flops(programs[way].run),
        program_bytes=timing.program_bytes(programs[way].run),
        device_peak_bytes=timing.device_peak_bytes(),
        attention=self._attention("train", path),
      )
      for way in WAYS
    ]

  def _features_fn(self, sizes: dict):
    """The teacher of training (training/teacher.py), of random weights."""
    side = sizes["grid"] * sizes["patch_size"]
    init = jax.jit(lambda key: unbox(ViT(**sizes).init(key, jnp.zeros((1, side, side, 3)))["params"]))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return teacher.make_features_fn(self.config, sizes, init(self._key(7)), mesh)


def _by_path(state) -> dict[str, jax.Array]:
  """The arrays of a state by their places: two states of one model share what both have, and so fit into memory."""
  return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}


def check(config: ConfigDict):
  """Raises ValueError where a config has no job "repa"."""
  if repa.section(config) is None:
    raise ValueError("--jobs: the job 'repa' needs REPA: give --config.repa.weight=1")
  teacher_sizes(config.repa.features)


def costs(rows: Iterable[Row]) -> list[dict]:
  """Returns how many times as long as without REPA a step takes: of the medians, and least and most in a round."""
  by_way = {row.path: row for row in rows if row.job == "repa"}
  result = []
  for way in WAYS[1:] if by_way else ():
    pairs = [a / b for a, b in zip(by_way[way].seconds, by_way["off"].seconds)]
    medians = [statistics.median(by_way[name].seconds) for name in (way, "off")]
    result.append(
      {
        "kind": "cost",
        "job": "repa",
        "path": way,
        "rounds": len(pairs),
        "over_off": medians[0] / medians[1],
        "min": min(pairs),
        "max": max(pairs),
        "flops_over_off": by_way[way].flops / by_way["off"].flops,
      }
    )
  return result
