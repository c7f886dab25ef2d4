"""Workdirs in a bucket, with a folder in its place (tests/support/bucket.py), and workdirs that cannot be used."""

import os
from pathlib import Path

from etils import epath
import jax
import numpy as np
import pytest

from flextok_jax import evaluate, train
from flextok_jax.config import read_config
from flextok_jax.core import workdirs
from flextok_jax.core.extras import MissingPackageError
from flextok_jax.training import checkpoint, loop
from flextok_jax.weights import loading
from tests.support import bucket
from tests.support.commands import run
from tests.support.runs import assert_trees_equal, checkpoint_steps, config_of, read_metrics

WORKDIR = "gs://bucket/runs/a"
FILES = {
  "config.json",
  "metrics.jsonl",
  "report.html",
  "weights.safetensors",
  "checkpoints",
  "eval",
  "tensorboard",
  "profile",
}


def test_a_run_in_a_bucket_writes_and_resumes_as_in_a_folder(tmp_path, monkeypatch, capsys):
  """Also read back: by the run itself, by evaluate, by load and as init_from."""
  monkeypatch.chdir(tmp_path)
  # JAX's own profile takes ten seconds (tests/training/test_goodput.py).
  write = lambda folder: (Path(folder).mkdir(parents=True), (Path(folder) / "host.xplane.pb").write_bytes(b"profile"))
  monkeypatch.setattr(jax.profiler, "start_trace", write)
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
  here = bucket.mount(monkeypatch, tmp_path / "remote") / "bucket" / "runs" / "a"
  settings = dict(log_every=2, checkpoint_every=2, eval_every=2, keep_checkpoints=9, tensorboard=True)
  quick = dict(fast=False, sampler=dict(num_steps=1, guidance="none"), eval=dict(num_tokens=(1,), num_images=2))
  config = lambda steps: config_of(train=dict(num_steps=steps, **settings), profile_steps=(2, 3), **quick)
  train.train(config(2), WORKDIR)
  assert {p.name for p in here.iterdir()} == FILES
  train.train(config(4), WORKDIR)
  assert "resuming from step 2 of gs://bucket/runs/a" in capsys.readouterr().out
  train.train(config(4), f"{WORKDIR}/")
  assert "nothing to do: gs://bucket/runs/a is at step 4" in capsys.readouterr().out

  assert checkpoint_steps(here) == [2, 4] and read_config(WORKDIR).train.num_steps == 4
  lines, evals = read_metrics(here)
  assert [x["step"] for x in lines] == [2, 4] and [x["step"] for x in evals] == [2, 4]
  assert {p.name for p in (here / "eval").iterdir()} == {"00000002", "00000004"}
  report = (here / "report.html").read_text()  # of the last start
  assert "finished" in report and "<b>step 2</b>" in report and "<b>step 4</b>" in report
  assert len(list((here / "tensorboard").iterdir())) == 3 and list((here / "profile").rglob("*.pb"))
  params = loading.load(WORKDIR)[1]
  assert_trees_equal(params, loading.load(str(here))[1])
  for source in (f"{WORKDIR}/checkpoints/4", f"{WORKDIR}/weights.safetensors"):
    assert loading.load_config(source).stage == "tokenizer" and loading.is_ours(source)
    found = loading.load(source)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), found, params)
  run(evaluate, f"--workdir={WORKDIR}", "--num_images=2", "--num_tokens=1")
  run(evaluate, f"--workdir={WORKDIR}", "--num_images=2", "--num_tokens=1")
  assert len((here / "eval" / "eval.jsonl").read_text().splitlines()) == 2 and (here / "eval" / "report.json").exists()
  assert not (here / "eval" / "so_far").exists() or not list((here / "eval" / "so_far").iterdir())
  assert {p.name for p in tmp_path.iterdir()} == {"remote"}  # nothing in ./gs:


def test_a_lock_in_a_bucket(tmp_path, monkeypatch, caplog):
  """A run that renews it is noticed; one that was killed is waited for, unless it ran on this machine."""
  bucket.mount(monkeypatch, tmp_path)
  monkeypatch.setattr(workdirs, "_STALE_AFTER", 0.3)
  monkeypatch.setattr(workdirs, "_RENEW_EVERY", 0.05)
  lock = tmp_path / "b" / ".lock"
  for owner in ("process 1 on elsewhere, 1234; 7", f"process {os.getpid()} on {workdirs.socket.gethostname()}, 12; 7"):
    caplog.clear()
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(owner)
    with checkpoint.locked("gs://b"):
      assert lock.read_text().startswith(f"process {os.getpid()} on ")
      assert ("waiting" in caplog.text) == ("elsewhere" in owner)
      if "elsewhere" in owner:
        monkeypatch.setattr(workdirs.Lease, "_is_dead", lambda self, content: False)
        with pytest.raises(ValueError, match=rf"another run \(process {os.getpid()} on .*\) uses gs://b: stop it, or"):
          checkpoint.locked("gs://b").__enter__()
        monkeypatch.undo()
        bucket.mount(monkeypatch, tmp_path)
    assert not lock.exists()


def test_only_what_is_uploaded_and_changed_is_copied(tmp_path, monkeypatch):
  """Deleted files go; what another run has written stays."""
  here = bucket.mount(monkeypatch, tmp_path) / "b"
  here.mkdir()
  (here / "metrics.jsonl").write_text("old\n")
  (here / "other").write_text("other")
  outputs = workdirs.Outputs(epath.Path("gs://b"), ["metrics.jsonl", "absent"])
  assert (outputs.path / "metrics.jsonl").read_text() == "old\n"
  (outputs.path / "eval").mkdir()
  (outputs.path / "eval" / "a.png").write_bytes(b"a")
  outputs.upload(now=False)
  assert not (here / "eval").exists()
  outputs.upload()
  assert (here / "eval" / "a.png").read_bytes() == b"a"
  (outputs.path / "eval" / "a.png").unlink()
  (outputs.path / "metrics.jsonl").write_text("old\nnew\n")
  outputs.close()
  assert {p.name: p.read_text() for p in here.iterdir() if p.is_file()} == {
    "metrics.jsonl": "old\nnew\n",
    "other": "other",
  }
  assert not list((here / "eval").iterdir()) and not outputs.path.exists()


@pytest.mark.parametrize(
  "workdir, words",
  [
    ("s3://bucket/run", "workdir='s3://bucket/run' cannot be used: give a folder or gs://BUCKET/FOLDER"),
    ("gs:/bucket/run", "workdir='gs:/bucket/run' cannot be used: write gs://BUCKET/FOLDER"),
    ("file:///tmp/run", "cannot be used: give a folder"),
    ("gs://", "workdir=gs:// names no bucket"),
    (__file__, "test_remote_workdirs.py is a file: give a folder"),
    (f"{__file__}/run", "workdir=.*/run cannot be written: Not a directory"),
    ("/proc/run", "workdir=/proc/run cannot be written: No such file or directory"),
  ],
)
def test_a_workdir_that_cannot_be_used_is_named_before_anything_compiles(tmp_path, monkeypatch, workdir, words):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(loop, "init_state", None)
  with pytest.raises(ValueError, match=words) as error:
    train.train(config_of(), workdir)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_bucket_without_its_packages_or_credentials_is_named(tmp_path, monkeypatch):
  with pytest.raises(MissingPackageError, match=r"workdir=gs://b/run needs .*: pip install 'flextok-jax\[gcs\]'"):
    train.train(config_of(), "gs://b/run")
  bucket.mount(monkeypatch, tmp_path)

  class DefaultCredentialsError(Exception):
    pass

  def denied(*args, **kwargs):
    raise DefaultCredentialsError("Your default credentials were not found.\nTo set up, see")

  monkeypatch.setattr(workdirs.epath.Path("gs://b")._backend, "makedirs", denied)
  words = r"workdir=gs://b/run cannot be read or written \(DefaultCredentialsError: Your default .* found.\): check the"
  with pytest.raises(ValueError, match=words) as error:
    train.train(config_of(), "gs://b/run")
  assert "\n" not in str(error.value)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert workdirs.resolve("~/runs/a") == epath.Path(tmp_path / "runs" / "a")
  with checkpoint.locked(str(workdirs.resolve("~/runs/a"))):
    assert [p.name for p in Path(tmp_path / "runs" / "a").iterdir()] == [".lock"]
