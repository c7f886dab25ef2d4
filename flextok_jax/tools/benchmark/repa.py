"""The benchmark's job "repa": the cost of REPA in a training step on latents.

A step in three ways: "off", without REPA; "features", with the teacher's features in the batch, as read from shards;
"teacher", with a DINOv2 of random weights that computes them from the images first.
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
from flextok_jax.tools.benchmark import jobs
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
  return flops.count(vit.apply, params, images)


class RepaBenchmark(jobs.TokenizerBenchmark):
  """The jobs of a tokenizer, including "repa"."""

  def compute(self, job: str) -> Compute:
    return super().compute("train" if job == "repa" else job)

  def run(self, job: str, num_tokens: int | None, repeats: int, limit: float) -> list[Row]:
    if job != "repa":
      return super().run(job, num_tokens, repeats, limit)
    path, size = "fast" if self.config.fast else "plain", self.batch_size
    config = self.config.copy_and_resolve_references()
    config.repa.weight = 0.0
    programs, shapes, inputs, counts = {}, {}, {}, {}
    arrays: dict[str, jax.Array] = {}
    for way, bench in (
      ("off", RepaBenchmark(config, (path,), size, True)),
      ("features", RepaBenchmark(self.config, (path,), size, True)),
    ):
      (state, *inputs[way]), made = bench.prepare("train", None)
      fn, counts[way] = made[path]
      programs[way] = self._compiler(fn, (state, *inputs[way]), self.compute(job)[1], donated=True)
      shapes[way] = jax.eval_shape(lambda x: x, state)
      arrays |= _by_path(state)  # finally those of the state with REPA, which contains the other
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
        attention=self.attention_of("train", path),
      )
      for way in WAYS
    ]

  def _features_fn(self, sizes: dict):
    """Returns the teacher of training (training/teacher.py) with random weights."""
    side = sizes["grid"] * sizes["patch_size"]
    init = jax.jit(lambda key: unbox(ViT(**sizes).init(key, jnp.zeros((1, side, side, 3)))["params"]))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    c = self.config
    options = dict(grid=repa.teacher_grid(c), dtype=c.repa.dtype, attention=c.attention)
    return teacher.make_features_fn(sizes, init(self._key(7)), mesh, **options)


def _by_path(state) -> dict[str, jax.Array]:
  """Returns the arrays of a state by path: two states of a model share them, so that both fit into memory."""
  return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}


def check(config: ConfigDict):
  """Raises ValueError if a config has no job "repa"."""
  if repa.section(config) is None:
    raise ValueError("the job 'repa' needs REPA: set repa.weight=1")
  teacher_sizes(config.repa.features)


def costs(rows: Iterable[Row]) -> list[dict]:
  """Returns the time of a step relative to one without REPA: ratio of the medians, and range over the rounds."""
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
