"""Compares the results of jobs on this machine's accelerator with those of the plain path on its CPU in float32."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.config import with_fields
from flextok_jax.tools.benchmark import jobs
from flextok_jax.training import metrics

# Largest errors by dtype: of numbers, over the largest number of the reference; of token ids, the share that differs.
# An id differs where a code, or a draw, lies near a boundary. [ours]
BOUNDS = {"float32": (1e-3, 0.02), "bfloat16": (0.05, 0.2)}


def compare(
  make: Callable[..., jobs.TokenizerBenchmark],
  config: ConfigDict,
  names: Sequence[str],
  paths: tuple[str, ...],
  counts: Sequence[int],
  batch_size: int,
  latents: bool,
) -> list[dict]:
  """Returns a row {"job", "num_tokens", "path", "error", "bound", …} for each job, number of tokens and path.

  Parameters and inputs are random and the same on both sides. Of a training step, loss and norm of the gradient are
  compared. float32 has full precision here, in training too.

  Args:
    make: builds the benchmark of the config's stage.
    config: of the model.
    names: of jobs.
    paths: to compare with the reference.
    counts: numbers of tokens of jobs that have them.
    batch_size: images per call.
    latents: see TokenizerBenchmark.
  """
  plain = with_fields(config, {"dtype": "float32", "vae.dtype": "float32", "attention": "xla"})
  reference = make(plain, jobs.PATHS[:1], batch_size, latents)
  bench = make(config, paths, batch_size, latents)
  device, cpu = jax.devices()[0], jax.devices("cpu")[0]
  rows: list[dict] = []
  for job in names:
    for count in counts if job in ("tokenize", "detokenize", "ar") else (None,):
      (expected,) = _results(reference, job, count, cpu).values()
      for path, found in _results(bench, job, count, device).items():
        error, is_ids = _error(found, expected)
        bound = BOUNDS[bench.compute(job)[0]][is_ids]
        row: dict = {"kind": "parity", "job": job, "num_tokens": count, "path": path, "dtype": bench.compute(job)[0]}
        row |= {"attention": bench.attention_of(job, path), "error": error, "bound": bound, "passed": error <= bound}
        rows.append(row | {"of": "ids" if is_ids else "numbers", "device": device.device_kind})
        print(format_row(rows[-1]), flush=True)
  return rows


def format_row(row: dict) -> str:
  """Returns a row as a line for the console."""
  name = row["job"] + (f" k={row['num_tokens']}" if row["num_tokens"] else "")
  what = f"{row['error']:.1%} of the ids differ" if row["of"] == "ids" else f"largest error {row['error']:.1e}"
  verdict = "passed" if row["passed"] else "FAILED"
  return f"{verdict}: {name}, {row['path']}, {row['dtype']}, {row['attention']}: {what} (at most {row['bound']:g})"


def _results(bench: jobs.TokenizerBenchmark, job: str, count: int | None, device: jax.Device) -> dict[str, np.ndarray]:
  """Returns {path: result of a job on a device}."""
  precision = "highest" if bench.compute(job)[0] == "float32" else None
  with jax.default_device(device), jax.default_matmul_precision(precision):
    args, made = bench.prepare(job, count)
    return {path: _comparable(jax.jit(fn)(*args), job, count) for path, (fn, _) in made.items()}


def _comparable(result: Any, job: str, count: int | None) -> np.ndarray:
  if job == "train":
    scalars = metrics.compute(result[1])
    return np.array([scalars["loss"], scalars["grad_norm"]])
  array = np.asarray(jax.device_get(jax.tree.leaves(result)[0]))
  if np.issubdtype(array.dtype, np.integer):
    return array[:, :count]
  return array.astype(np.float64)


def _error(found: np.ndarray, expected: np.ndarray) -> tuple[float, bool]:
  """Returns (error, whether these are ids)."""
  if np.issubdtype(expected.dtype, np.integer):
    return float((found != expected).mean()), True
  over = np.abs(expected) if expected.ndim == 1 else np.abs(expected).max()  # loss and norm: each over itself
  return float((np.abs(found - expected) / over).max()), False
