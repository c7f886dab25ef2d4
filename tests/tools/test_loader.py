"""The loader benchmark on a few small files: rows, table, JSON lines and errors; times are not checked."""

import json
import threading

import numpy as np
from PIL import Image
import pytest

from flextok_jax import benchmark
from flextok_jax.data import transforms
from flextok_jax.tools import loader
from tests.support.commands import config_file, fails, run


def test_rows_table_and_lines(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(loader, "WAYS", ("plain", "threads"))  # without worker processes, which start slowly
  config = config_file(tmp_path / "config.py", data=dict(global_batch=4))
  out = tmp_path / "loader.jsonl"
  monkeypatch.setattr(loader, "SIZE", (60, 50))
  monkeypatch.setattr(loader, "STEPS", 1)
  run(benchmark, f"--config={config}", "--jobs=loader", "--files=6", "--repeats=2", f"--out={out}")
  printed = capsys.readouterr().out
  *ways, training = map(json.loads, out.read_text().splitlines())
  assert [row["way"] for row in ways] == ["plain", "threads"] and all(row["way"] in printed for row in ways)
  for row in ways:
    assert len(row["images_per_second"]) == len(row["over_plain"]) == 2 and row["cpu_ms"] > 0
  ratios = np.divide(*(row["images_per_second"] for row in reversed(ways)))
  assert ways[0]["over_plain"] == [1, 1] and ways[1]["over_plain"] == pytest.approx(ratios)
  assert 0 <= training["waiting"] <= 1 and training["step_ms"] > 0 and "waits for data" in printed
  assert "6 JPEG files of 60 x 50 px" in printed
  assert not any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate())


def test_files_have_the_requested_size_and_are_reproducible(tmp_path):
  one, other = (loader.write_photographs(tmp_path / name, 5, (50, 40)) for name in ("one", "other"))
  assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
  assert all(Image.open(path).size == (50, 40) and Image.open(path).format == "JPEG" for path in one)
  assert len({path.read_bytes() for path in one}) == 5
  assert len(list((tmp_path / "one" / "validation").iterdir())) == 1


def test_plain_loop_draws_the_same_crops(tmp_path):
  """Both draw the same regions from the same random numbers: crops are much closer than for other regions."""
  paths = loader.write_photographs(tmp_path, 8, (100, 80))
  rng = np.random.default_rng(0)
  ours, others = ([transforms.random_resized_crop(path, 16, rng, 0.4) for path in paths] for _ in range(2))
  plain = np.stack(list(loader.plain_loop(paths, 16, 0.4))).astype(int)
  apart = lambda crops: np.abs(np.stack(crops) - plain)[:, 2:-2, 2:-2].mean((1, 2, 3))
  assert (apart(ours) < apart(others) / 4).all()


def test_bad_input_is_one_line():
  fails("--files=0: .*", benchmark, "--config=loader", "--jobs=loader", "--files=0")
  fails("--jobs: unknown 'loader'", benchmark, "--config=loader", "--jobs=loader,train")
