"""The page of a run."""

import json
import re

from etils import epath
import numpy as np
from PIL import Image
import pytest

from flextok_jax.training.run_report import RunReport
from tests.support.runs import config_of


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / "metrics.jsonl").touch()
  return tmp_path


def make(workdir, clock=lambda: 0.0, **train):
  config = config_of(train=dict(num_steps=100, **train))
  return RunReport(workdir / "report.html", workdir / "metrics.jsonl", epath.Path(workdir), config, clock)


def picture(path, size=(120, 40)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(path)
  return path


def page(workdir):
  return (workdir / "report.html").read_text()


def chart(text, title):
  """Returns (x, y) of the points of a chart with a single line."""
  (card,) = re.findall(rf"<b>{title}</b>(<svg.*?</svg>)", text)
  return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="(.*?)" cy="(.*?)"', card)]


def test_a_resumed_run_has_its_whole_history_and_each_step_once(workdir):
  """Steps 6 and 8 were logged by a run that was killed, and again by the one that resumed from step 4."""
  lines = [{"step": step, "loss": loss} for step, loss in ((2, 9.0), (4, 7.0), (6, 1.0), (8, 1.0), (6, 5.0))]
  lines += [{"step": 4, "eval/photos/psnr_1": 10.0, "eval/photos/psnr_16": 20.0}]
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "[1]\nno JSON\n")
  picture(workdir / "eval" / "00000004" / "grid_photos.png")
  picture(workdir / "eval" / "00000004" / "curve.png")
  (workdir / "eval" / "eval.jsonl").touch()  # of the evaluate command
  report = make(workdir)
  report.write(8, {"loss": 3.0, "images_per_second": 80.0, "eta_seconds": 3723.0}, [])
  text = page(workdir)
  (x0, y0), (x1, y1), (x2, y2), (x3, y3) = points = chart(text, "Loss")
  assert points == sorted(points) and x1 - x0 == pytest.approx(x3 - x2, abs=0.2)
  assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2) == pytest.approx(y3 - y2, abs=0.2)  # 9, 7, 5, 3
  assert "1:02:03" in text and "8 of 100" in text and "<td>16</td><td>20</td>" in text
  assert text.count("data:image/png") == 2 and "<b>step 4</b> photos" in text


def test_the_page_is_one_file(workdir):
  """Nothing is loaded from elsewhere, and texts are escaped."""
  (workdir / "metrics.jsonl").write_text('{"step": 1, "<script>": 1, "loss": 2}\n')
  report = make(workdir, wandb="<script>alert(1)")
  report.write(10, {"eval/<b>/psnr_1": 1.0}, [picture(workdir / "grid_x.png")])
  text = page(workdir)
  assert "<script" not in text and "://" not in text and "<link" not in text and "&lt;script&gt;alert(1)" in text
  assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)="(.*?)"', text))


def test_when_the_page_is_written(workdir):
  """At once, at evaluations, else after 30 seconds; it refreshes itself until the run ends."""
  now = [1000.0]
  report = make(workdir, lambda: now[0])

  def written(step, scalars, *pictures):
    report.write(step, scalars, pictures)
    return f"{step} of 100" in page(workdir)

  assert written(1, {"loss": 1.0})
  now[0] += 29
  assert not written(2, {"loss": 1.0})
  now[0] += 1
  assert written(3, {"loss": 1.0}) and not written(4, {"loss": 1.0})
  report.write(4, {"eval/loss": 1.0}, [picture(workdir / "grid_x.png")])
  assert "Last evaluation, step 4" in page(workdir) and 'http-equiv="refresh"' in page(workdir)
  report.close()
  assert "stopped" in page(workdir) and 'http-equiv="refresh"' not in page(workdir)
  report.write(100, {"loss": 1.0}, [])
  report.close()
  assert "finished" in page(workdir)
  assert sorted(path.name for path in workdir.iterdir()) == ["grid_x.png", "metrics.jsonl", "report.html"]


def test_the_size_is_bounded(workdir):
  lines = (f'{{"step": {step}, "loss": {1 + 1 / step:.6f}}}\n' for step in range(1, 30_001))
  (workdir / "metrics.jsonl").write_text("".join(lines))
  report = make(workdir)
  for step in range(10, 130, 10):
    path = picture(workdir / "eval" / f"{step:08d}" / "grid_x.png", (2400, 300) if step == 120 else (120, 40))
    report.write(step, {"eval/loss": 1.0}, [path])
  text = page(workdir)
  shown = [int(step) for step in re.findall(r"<b>step (\d+)</b>", text)]
  assert shown == [120, 110, 100, 90, 80, 70, 60, 10] and len(text) < 600_000
  assert text.count("data:image/jpeg") == 1  # the large one
  (path,) = re.findall(r'<b>Loss</b>.*?<path d="M([^"]*)" fill="none"', text)
  assert 200 < path.count("L") < 500
  assert [int(s) for s in re.findall(r"<b>step (\d+)</b>", reopened(workdir))] == shown


def reopened(workdir):
  make(workdir).close()
  return page(workdir)


def test_a_page_that_cannot_be_written_does_not_stop_the_run(workdir, caplog):
  (workdir / "report.html").mkdir()
  report = make(workdir)
  report.write(1, {"loss": 1.0}, [])
  report.close()
  assert caplog.text.count("report.html") == 2
