"""The evaluate command on samples of a tiny generator, with networks of random weights."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file

from flextok_jax import evaluate, sample
from flextok_jax.evals.metrics import frechet
from flextok_jax.evals.metrics import samples as sample_metrics
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report
from flextok_jax.models.perception import inception, vit
from flextok_jax.models.perception.inception import FIDInception
from flextok_jax.weights.perception import inception as inception_files
from flextok_jax.weights.perception import networks
from flextok_jax.weights.perception.vit import load_vit
from tests.support import clip_reference, tiny_generators, vit_reference
from tests.support.commands import ROOT, environment, fails, run

TOTAL = 13


@pytest.fixture(scope="module", autouse=True)
def small_inception():
  """Inception's input is 75 px instead of 299, a sixteenth of the work; full size: test_inception.py."""
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(inception, "SIZE", 75)
    yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return tiny_generators.save(tmp_path_factory.mktemp("models"))


def write_inception(path):
  """Writes random weights that keep the scale of the activations."""
  rng, tensors = np.random.default_rng(0), {}
  for name, shape in inception_files.parameter_shapes().items():
    if name.startswith("fc/"):
      tensors["fc.weight"] = rng.normal(0, 0.02, shape[::-1]).astype(np.float32)
    elif name.endswith("/kernel"):
      kernel = rng.normal(0, (2 / np.prod(shape[:3])) ** 0.5, shape).astype(np.float32)
      module = name.removesuffix("/kernel").replace("/", ".")
      tensors[f"{module}.conv.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
      for kind, value in dict(weight=1, bias=0, running_mean=0, running_var=1).items():
        tensors[f"{module}.bn.{kind}"] = np.full(shape[3], value, np.float32)
  save_file(tensors, path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  folder = tmp_path_factory.mktemp("weights")
  write_inception(folder / "inception.safetensors")
  for name, reference, case in (("classifier", vit_reference, "registers"), ("clip", clip_reference, "laion")):
    (folder / name).mkdir()
    reference.write(case, folder / name)
  clip_reference.write_tokenizer(folder / "clip")
  return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  path = tmp_path_factory.mktemp("reference") / "images.npz"
  np.savez(path, arr_0=np.random.default_rng(1).integers(0, 256, (9, 16, 16, 3)).astype(np.uint8))
  return path


def flags_of(models, weights, reference, out, *args):
  return (
    f"--checkpoint={models['class']}",
    f"--tokenizer={models['tokenizer']}",
    f"--weights={weights}",
    f"--reference={reference}",
    f"--num_images={TOTAL}",
    "--batch_size=8",
    "--classes=3,0,4",
    "--guidance_scale=2",
    "--seed=5",
    f"--out={out}",
    *args,
  )


@pytest.fixture(scope="module")
def report(models, weights, reference, tmp_path_factory):
  out = tmp_path_factory.mktemp("report")
  run(
    evaluate,
    *flags_of(
      models,
      weights,
      reference,
      out,
      "--metrics=is,precision,recall,top1",
      "--num_tokens=1,4",
      "--samples_npz",
      f"--save_reference={out / 'stats.npz'}",
    ),
  )
  return out


def scores(out):
  return json.loads((out / "report.json").read_text())["sets"]["samples"]


def pictures(out, count):
  return read_images(out / f"samples_{count}.npz")


def test_samples_equal_those_of_the_sample_command(models, report, tmp_path):
  run(
    sample,
    f"--checkpoint={models['class']}",
    f"--tokenizer={models['tokenizer']}",
    "--classes=3,0,4",
    "--seed=5",
    "--guidance_scale=2",
    "--npz",
    f"--out={tmp_path}",
  )
  with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
    np.testing.assert_allclose(pictures(report, 4)[:3].astype(int), arrays["arr_0"], atol=1)
  assert pictures(report, 4).shape == (TOTAL, 16, 16, 3) and len({x.tobytes() for x in pictures(report, 4)}) == TOTAL
  assert (report / "grid_samples.png").is_file() and (report / "curve.png").is_file()
  assert not list(report.glob("*.part.npy")) and not (report / "so_far").exists()
  assert scores(report)["reference_images"] == 9


def distance_of_few(a, b):
  """Returns the Fréchet distance of fewer samples than features, from the singular values of their product."""
  a, b = np.float64(a), np.float64(b)
  (mu, x), (nu, y) = ((z.mean(0), (z - z.mean(0)) / np.sqrt(len(z) - 1)) for z in (a, b))
  return np.square(mu - nu).sum() + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc")


@pytest.fixture(scope="module")
def look(weights):
  params = inception_files.load_inception(weights / "inception.safetensors")
  with jax.default_matmul_precision("highest"):  # params are an argument: as constants they would compile slowly
    run_network = jax.jit(lambda params, images: FIDInception().apply({"params": params}, images / np.float32(255)))

  def outputs(images):
    padded = np.resize(images, (TOTAL, *images.shape[1:]))  # one program for all
    return {name: x[: len(images)] for name, x in run_network(params, padded).items()}

  return outputs


def read_images(path):
  with np.load(path, allow_pickle=False) as arrays:
    return arrays["arr_0"]


def test_metrics_equal_those_of_the_saved_images(weights, reference, report, look):
  sizes, head = load_vit(weights / "classifier")
  classify = jax.jit(lambda images: vit.ViT(**sizes).apply({"params": head}, vit.preprocess(images / np.float32(255))))
  real = look(read_images(reference))
  for column in ("1", "4"):
    images = pictures(report, column)
    fake, found = look(images), scores(report)["by_tokens"][column]
    assert list(found) == ["is", "is_std", "precision", "recall", "top1"]
    np.testing.assert_allclose(found["is"], sample_metrics.inception_score(np.asarray(fake["logits"]))[0], rtol=1e-4)
    both = sample_metrics.precision_recall(np.asarray(real["pool"]), np.asarray(fake["pool"]))
    assert (found["precision"], found["recall"]) == pytest.approx(both)
    labels = np.resize([3, 0, 4], TOTAL)
    with jax.default_matmul_precision("highest"):
      assert found["top1"] == pytest.approx((classify(images)["logits"].argmax(1) == labels).mean())
  saved = frechet.load_statistics(report / "stats.npz")
  np.testing.assert_allclose(saved["mu_s"], np.float64(real["spatial"]).mean(0), rtol=1e-4, atol=1e-6)


def test_distances_to_saved_statistics_and_resuming(
  models, weights, reference, report, look, tmp_path, monkeypatch, capsys
):
  args = flags_of(models, weights, report / "stats.npz", tmp_path, "--num_tokens=4", "--keep_every=1", "--samples_npz")
  fails("precision and recall compare single images", evaluate, *args, "--metrics=recall")
  after = Progress.after_batch

  def stop(self, *given):
    after(self, *given)
    raise ValueError("stopped")

  def stop_writing(self, *given):
    raise ValueError("stopped")

  with monkeypatch.context() as patched:
    patched.setattr(Progress, "after_batch", stop)
    fails("stopped", evaluate, *args, "--metrics=gfid,sfid")
  with monkeypatch.context() as patched:  # between writing the samples' file and the report
    patched.setattr(Report, "write", stop_writing)
    patched.setattr(frechet, "frechet_distance", lambda *given: 0.0)  # takes seconds, and is not reported
    fails("stopped", evaluate, *args, "--metrics=gfid,sfid")
  assert "samples: resuming after 8 images" in capsys.readouterr().out
  run(evaluate, *args, "--metrics=gfid,sfid")
  np.testing.assert_array_equal(pictures(tmp_path, 4), pictures(report, 4))
  fake, real = look(pictures(tmp_path, 4)), look(read_images(reference))
  for name, layer in (("gfid", "pool"), ("sfid", "spatial")):
    found = scores(tmp_path)["by_tokens"]["4"][name]
    np.testing.assert_allclose(found, distance_of_few(fake[layer], real[layer]), rtol=1e-4)
  assert scores(tmp_path)["reference_images"] == 9
  notes = json.loads((tmp_path / "report.json").read_text())["notes"]
  assert notes[0].startswith(f"Caution: gfid of {TOTAL} samples and 9 reference images with 2048 features")


def test_two_processes(models, weights, report, tmp_path):
  args = [
    f"--checkpoint={models['class']}",
    f"--tokenizer={models['tokenizer']}",
    f"--weights={weights}",
    "--metrics=top1",
    "--num_tokens=4",
    f"--num_images={TOTAL}",
    "--batch_size=6",
    "--classes=3,0,4",
    "--guidance_scale=2",
    "--seed=5",
    "--samples_npz",
    f"--out={tmp_path}",
  ]
  env = environment(2, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  command = ["bash", "launch/local.sh", "2", "python", "-m", "flextok_jax.evaluate", *args]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count("eval.jsonl") == 1  # one process prints
  assert scores(tmp_path)["by_tokens"]["4"]["top1"] == scores(report)["by_tokens"]["4"]["top1"]
  np.testing.assert_allclose(pictures(tmp_path, 4).astype(int), pictures(report, 4), atol=1)


def test_clip_score_of_text_prompts(models, weights, tmp_path):
  (tmp_path / "prompts.txt").write_text("red bee\nace\n")
  run(
    evaluate,
    f"--checkpoint={models['text']}",
    f"--tokenizer={models['tokenizer']}",
    f"--weights={weights}",
    "--metrics=clip",
    f"--prompts_file={tmp_path / 'prompts.txt'}",
    "--num_images=5",
    "--num_tokens=4",
    "--samples_npz",
    f"--out={tmp_path / 'out'}",
  )
  images, texts = networks.clip(weights, "clip")
  vectors = texts(["red bee", "ace"])[[0, 1, 0, 1, 0]]
  cosines = (images(pictures(tmp_path / "out", 4) / np.float32(255)) * vectors).sum(1)
  found = scores(tmp_path / "out")
  assert found["by_tokens"]["4"]["clip"] == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-4)
  low, high = found["intervals"]["4"]["clip"]
  assert low <= found["by_tokens"]["4"]["clip"] <= high


def test_bad_flags_are_one_line_errors(models, weights, reference, tmp_path):
  base = [f"--checkpoint={models['class']}", f"--tokenizer={models['tokenizer']}", f"--out={tmp_path / 'out'}"]
  fails("--metrics is missing: of samples there are gfid", evaluate, *base)
  fails("--sources has no meaning with --tokenizer", evaluate, *base, "--sources=photos")
  fails("--classes has no meaning without --tokenizer", evaluate, *base[::2], "--classes=1")
  fails("--metrics=rfid is not a metric of samples", evaluate, *base, "--metrics=rfid")
  fails("--metrics=sfid needs --reference", evaluate, *base, "--metrics=sfid")
  fails("metrics=clip compares samples with their prompts", evaluate, *base, "--metrics=clip")
  fails("metric 'is' needs weights=DIR, a folder with inception: pt_inception", evaluate, *base, "--metrics=is")
  fails(
    "metrics=top1 compares samples with their class",
    evaluate,
    f"--checkpoint={models['none']}",
    *base[1:],
    "--metrics=top1",
  )
  fails("give a tokenizer as well", evaluate, *base[::2], "--metrics=gfid")
  fails("no such file", evaluate, *base, "--metrics=gfid", "--reference=/absent.npz", f"--weights={weights}")
  assert not (tmp_path / "out").exists()


def test_statistics_of_a_folder_alone(weights, reference, tmp_path, look, capsys):
  """Without a checkpoint the statistics alone are written; unreadable pictures are left out and counted."""
  images, size = read_images(reference), read_images(reference).shape[1]
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
  (tmp_path / "aa.png").write_bytes(b"x")
  base = f"--weights={weights}", "--batch_size=8"
  run(evaluate, *base, f"--reference={tmp_path}", f"--image_size={size}", f"--save_reference={tmp_path}/stats.npz")
  assert f"statistics of {len(images)} images" in capsys.readouterr().out
  found, pools = frechet.load_statistics(tmp_path / "stats.npz"), look(images)["pool"]
  assert frechet.count_images(tmp_path / "stats.npz") == frechet.count_images(reference) == len(images)
  np.testing.assert_allclose(found["mu"], pools.mean(0), rtol=1e-3, atol=1e-4)
  alone = f"--save_reference={tmp_path / 'a.npz'}", *base
  fails("--reference is missing", evaluate, *alone)
  fails("image_size is missing", evaluate, *alone, f"--reference={tmp_path}")
  fails("reference=photos is a data source: give a config", evaluate, *alone, "--reference=photos")
  fails("reference=./absent is no folder, no .npz file and no data source", evaluate, *alone, "--reference=./absent")
  fails("--metrics has no meaning", evaluate, *alone, f"--reference={tmp_path}", "--metrics=gfid")
