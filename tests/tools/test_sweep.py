"""Sweeps: what a config lists, the table that compares runs, and launch/sweep.sh that trains or submits them."""

import json
import os
from pathlib import Path
import shlex
import signal
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from flextok_jax import sweep
from flextok_jax.configs import ablation_nested, debug
from flextok_jax.ops import nested
from tests.launch import test_launch
from tests.launch.test_launch import bare, box, made, repo, wait_until  # noqa: F401 fixtures
from tests.support import commands
from tests.support.commands import ROOT, fails, run
from tests.support.configs import parse

CONFIG = """
from flextok_jax.configs import debug

def get_config(arg=""):
  c = debug.get_config()
  c.train.update(num_steps=2, log_every=1, checkpoint_every=2)
  c.sampler.update(num_steps=1, guidance="none")
  c.eval.num_tokens = (1, 4)
  return c

def get_sweep(arg=""):
  return SWEEP
"""


def config_file(folder, runs, name="config.py"):
  (folder / name).write_text(CONFIG.replace("SWEEP", runs if isinstance(runs, str) else repr(runs)))
  return folder / name


def listed(capsys, *args):
  """{name: flags} that --list prints."""
  capsys.readouterr()
  run(sweep, "--list", *args)
  lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
  return {line[0]: line[1:] for line in lines}


# The list.


def test_every_value_reaches_the_config_of_its_run(tmp_path, capsys):
  runs = {
    "tuple": {"tokens.levels": (5, 3), "tokens.num_registers": 8},
    "one": {"tokens.levels": (7,)},
    "list": {"eval.sources": ["synthetic", "photos"], "eval.num_tokens": []},
    "text": {"data.sources.folder.path": '/mnt/it\'s "here" $HOME; a\\b', "init_from": "", "ar.tokenizer": "(8, 5)"},
    "r1.5": {"optim.learning_rate": 1, "ar.position_decay": -1e-30, "fast": False, "seed": 3},
    "same": {},
  }
  config = config_file(tmp_path, runs)
  found = listed(capsys, f"--config={config}:x")
  assert list(found) == list(runs)
  for name, fields in runs.items():
    expected = parse(config)
    expected.update_from_flattened_dict(fields)
    assert parse(config, *found[name]) == expected, name
  assert list(listed(capsys, f"--config={config}", "--only=one,same")) == ["one", "same"]


def test_the_argument_of_the_config_is_that_of_its_sweep(tmp_path, capsys):
  config = config_file(tmp_path, "{arg: {'seed': len(arg)}}")
  assert listed(capsys, f"--config={config}:abc") == {"abc": ["--config.seed=3"]}


def test_the_ablation_has_every_mode(capsys):
  found = listed(capsys, "--config=ablation_nested", "--data=FOLDER")  # launch/sweep.sh passes flags of training
  assert list(found) == list(ablation_nested.get_sweep()) == list(nested.MODES)
  for mode, words in found.items():
    assert parse("ablation_nested", *words).tokens.nested_dropout == mode


@pytest.mark.parametrize(
  "words, runs",
  [
    ("run 'a' of the sweep sets tokens.nested: Key \"nested\" does not exist", {"a": {"tokens.nested": "pow2"}}),
    ("run 'a' of the sweep sets token.x: .*\"token\" was not found", {"a": {"token.x": 1}}),
    ("run 'b' of the sweep sets train.num_steps: .*0.5 is of original type", {"a": {}, "b": {"train.num_steps": 0.5}}),
    ("run 'a' of the sweep sets seed: --config.seed=7 cannot be given for all", {"a": {"seed": 1}}),
    ("sets optim.b1 to np.float64.0.5., which no flag", "{'a': {'optim.b1': __import__('numpy').float64(.5)}}"),
    ("sets init_from to 'a.nb', which no flag", {"a": {"init_from": "a\nb"}}),
    ("run 'a' of the sweep sets image_size: image_size must be .*, got -1", {"a": {"image_size": -1}}),
    ("sets tokens.levels.1. to 3, which no flag", {"a": {"tokens.levels[1]": 3}}),
    ("'a/b' in the sweep of .* cannot name a folder", {"a/b": {}}),
    ("'..' in the sweep of .* cannot name a folder", {"..": {}}),
    ("'--x' in the sweep of .* cannot name a folder", {"--x": {}}),
    ("'' in the sweep of .* cannot name a folder", {"": {}}),
    ("3 in the sweep of .* cannot name a folder", {3: {}}),
    ("'a_b' and 'A-b' in the sweep of .* are one name", {"a_b": {}, "A-b": {}}),
    ("get_sweep.. of .* must return .*, got {}", {}),
    ("get_sweep.. of .* must return .*, got \\[1\\]", [1]),
    ("get_sweep.. of .* must return", {"a": 3}),
    ("get_sweep.. of .*: ZeroDivisionError: division by zero", "1 / 0"),
  ],
)
def test_errors_in_a_sweep_are_one_line(words, runs, tmp_path, monkeypatch):
  argv = ["--list", f"--config={config_file(tmp_path, runs)}", "--config.seed=7"]
  monkeypatch.setattr(sys, "argv", ["sweep", *argv])  # where overrides are looked for
  fails(words, sweep, *argv)


def test_bad_flags_are_one_line(tmp_path):
  fails("debug has no get_sweep()", sweep, "--list", "--config=debug")
  fails("--list is missing --config", sweep, "--list")
  fails("give --dir=DIR, or", sweep)
  fails(
    "only=c: there is no such run in the sweep, which has a, b",
    sweep,
    "--list",
    "--only=c",
    f"--config={config_file(tmp_path, {'a': {}, 'b': {}})}",
  )
  fails(f"no runs in {tmp_path}: ", sweep, f"--dir={tmp_path}")
  fails("no runs in /absent: ", sweep, "--dir=/absent")


def test_data_that_a_run_would_not_read_is_refused(monkeypatch):
  argv = ["--list", "--config=ablation_nested", "--data=x", "--config.data.tokens=y"]
  monkeypatch.setattr(sys, "argv", ["sweep", *argv])  # where overrides are looked for
  fails("data=x has no effect, as data.tokens=y", sweep, *argv)


# The table.


def write_run(folder, name, losses, reports=None, **fields):
  """A workdir: losses {step: loss}, reports {folder: {set: {column: {metric: value}}}} from old to new."""
  config, workdir = debug.get_config(), folder / name
  config.update_from_flattened_dict(fields)
  workdir.mkdir(parents=True)
  (workdir / "config.json").write_text(config.to_json())
  lines = [{"step": step, "loss": loss, "images_per_second": 10.0 + i} for i, (step, loss) in enumerate(losses)]
  lines.append({"step": 99, "eval/synthetic/psnr_1": 3.0})
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
  for i, (where, sets) in enumerate((reports or {}).items()):
    path = workdir / "eval" / where / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"sets": {k: {"num_images": 4, "by_tokens": v} for k, v in sets.items()}}))
    os.utime(path, (1e9 + i, 1e9 + i))


def rows_of(text, title):
  """{first cell: the others} of a table in table.md, its header included."""
  lines = text.split(f"**{title}**\n\n")[1].split("\n\n")[0].splitlines()
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  return {row[0]: row[1:] for row in cells if row[0] != "---"}


@pytest.fixture
def runs(tmp_path):
  scores = lambda x: {"synthetic": {"1": {"psnr": x, "mae": 0.5}, "4": {"psnr": x + 1.234, "mae": 0.25}}}
  write_run(tmp_path, "r16", [(5, 1.0), (10, 0.75)], {"00000010": scores(12.0)}, seed=16)
  write_run(
    tmp_path,
    "r8",
    [(5, 2.0), (10, 0.5), (5, 1.5), (10, 0.25)],  # killed and resumed
    {"00000010": scores(1.0), "": scores(10.0)},
    **{"seed": 8, "tokens.levels": (5, 3)},
  )
  write_run(tmp_path, "begun", [])
  (tmp_path / "empty").mkdir()
  (tmp_path / "notes.txt").write_text("of mine")
  return tmp_path


def test_a_table_compares_the_runs_of_a_folder(runs, capsys):
  run(sweep, f"--dir={runs}", f"--out={runs / 'out'}")
  printed, text = capsys.readouterr().out, (runs / "out" / "table.md").read_text()
  assert rows_of(text, "Runs") == {
    "run": ["seed", "tokens.levels", "steps", "loss", "images/s", "report"],
    "begun": ["0", "(8, 8, 8, 5, 5, 5)", "-", "-", "-", "-"],
    "r8": ["8", "(5, 3)", "10", "0.25", "12.5", "eval/report.json"],
    "r16": ["16", "(8, 8, 8, 5, 5, 5)", "10", "0.75", "10.5", "eval/00000010/report.json"],
  }
  assert rows_of(text, "synthetic: PSNR dB") == {
    "run \\ tokens": ["1", "4"],
    "begun": ["-", "-"],
    "r8": ["10.00", "11.23"],
    "r16": ["12.00", "13.23"],
  }
  assert rows_of(text, "synthetic: MAE")["r16"] == ["0.5000", "0.2500"]
  assert all(line in printed for line in text.splitlines() if line.startswith("|"))
  found = json.loads((runs / "out" / "table.json").read_text())
  assert found["fields"] == ["seed", "tokens.levels"] and list(found["runs"]) == ["begun", "r8", "r16"]
  assert found["runs"]["r8"]["fields"] == {"seed": 8, "tokens.levels": [5, 3]}
  assert found["runs"]["r8"]["scores"]["sets"]["synthetic"]["by_tokens"]["4"]["psnr"] == 11.234
  assert found["runs"]["r8"]["metrics"] == {"step": 10, "loss": 0.25, "images_per_second": 13.0}
  picture = np.asarray(Image.open(runs / "out" / "table.png").convert("RGB"))
  assert picture.std() > 10 and str(runs / "out" / "table.png") in printed
  assert not (runs / "table.md").exists()


def test_a_table_of_some_runs_in_their_order(runs):
  run(sweep, f"--dir={runs}", "--only=r16,r8")
  assert list(rows_of((runs / "table.md").read_text(), "Runs")) == ["run", "r16", "r8"]
  words = f"only=empty: there is no such run in {runs}, which has begun, r8, r16"
  fails(words, sweep, f"--dir={runs}", "--only=empty")
  run(sweep, f"--dir={runs}", "--metrics=mae")
  assert "PSNR" not in (runs / "table.md").read_text() and "**synthetic: MAE**" in (runs / "table.md").read_text()
  fails(f"--metrics=rfid: the reports in {runs} have psnr, mae", sweep, f"--dir={runs}", "--metrics=rfid")
  (runs / "r8" / "eval" / "report.json").write_text("{")
  fails("r8/eval/report.json is not a report: ", sweep, f"--dir={runs}")


def test_runs_without_token_counts_or_reports(tmp_path):
  """Of stage "vae" a column; of "ar" the loss; where nothing was logged no picture."""
  write_run(tmp_path, "a", [(5, 1.0)], {"00000005": {"photos": {"vae": {"psnr": 20.5}}}})
  write_run(tmp_path, "b", [(i, 1 / i) for i in range(1, 100)])
  (tmp_path / "b" / "eval").mkdir()
  (tmp_path / "b" / "eval" / "report.json").write_text(json.dumps({"loss": 2.5, "by_position": []}))
  run(sweep, f"--dir={tmp_path}", f"--out={tmp_path / 'both'}")
  text = (tmp_path / "both" / "table.md").read_text()
  assert rows_of(text, "photos: PSNR dB") == {"run \\ tokens": ["vae"], "a": ["20.50"], "b": ["-"]}
  assert [row[-2] for row in rows_of(text, "Runs").values()] == ["loss held out", "-", "2.5"]
  write_run(tmp_path / "new", "c", [])
  run(sweep, f"--dir={tmp_path / 'new'}")
  assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["c", "table.json", "table.md"]
  assert "table.png" not in (tmp_path / "new" / "table.md").read_text()


# launch/sweep.sh


def script(*args, cwd=ROOT, environ=None, wait=True):
  """Runs launch/sweep.sh with this Python: (exit code, stdout, stderr), or the process."""
  environ = environ or commands.environment()
  environ = environ | {"PATH": f"{environ['PATH'].split(':')[0]}:{Path(sys.executable).parent}:{environ['PATH']}"}
  pipe = subprocess.PIPE
  process = subprocess.Popen(
    ["bash", str(ROOT / "launch" / "sweep.sh"), *map(str, args)],
    cwd=cwd,
    env=environ,
    stdin=subprocess.DEVNULL,
    stdout=pipe,
    stderr=pipe,
    text=True,
  )
  if not wait:
    return process
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


@pytest.fixture
def stand_in(tmp_path):
  """An environment in which training records its arguments in TMP/calls and runs the shell script TMP/train."""
  (tmp_path / "bin").mkdir()
  (tmp_path / "calls").touch()
  (tmp_path / "train").write_text("true")
  python = tmp_path / "bin" / "python"
  python.write_text(f"""#!/bin/bash
[[ $2 == flextok_jax.sweep && $* != *--list* ]] && {{ echo table "${{@:3}}"; exit; }}
[[ $2 == flextok_jax.train ]] || exec {sys.executable} "$@"
printf '%q ' "${{@:3}}" >>{tmp_path}/calls; echo >>{tmp_path}/calls
source {tmp_path}/train
""")
  submit = tmp_path / "bin" / "submit"
  submit.write_text(f"#!/bin/bash\nprintf '%q ' \"$@\" >>{tmp_path}/calls; echo >>{tmp_path}/calls\n")
  for file in (python, submit):
    file.chmod(0o755)
  return commands.environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def calls(folder):
  return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


RUNS = {"a_B": {"data.sources.folder.path": "it's $HOME"}, "c": {"tokens.levels": (5, 3)}, "d": {}}


def expected_calls(config, folder, *more):
  return [
    [f"--config={config}", f"--workdir={folder}/{name}", *flags_of, *more]
    for name, flags_of in (
      ("a_B", ["--config.data.sources.folder.path=it's $HOME"]),
      ("c", ["--config.tokens.levels=(5, 3)"]),
      ("d", []),
    )
  ]


def test_a_failed_run_is_reported_and_the_others_continue(stand_in, tmp_path):
  config_file(tmp_path, RUNS)
  (tmp_path / "train").write_text('[[ $* != */c* ]] || { echo "error: no luck" >&2; exit 3; }')
  code, out, err = script("config.py", "my runs/", "--config.seed=3", cwd=tmp_path, environ=stand_in)
  assert code == 1 and calls(tmp_path) == expected_calls("config.py", "my runs", "--config.seed=3")
  assert err.splitlines() == ["error: no luck", "error: the run c failed, see above", "error: failed runs: c"]
  assert out.splitlines()[-1] == "table --dir=my runs --only=a_B,d"


def test_sigterm_saves_the_current_run_and_ends_the_sweep(stand_in, tmp_path):
  config = config_file(tmp_path, RUNS)
  (tmp_path / "train").write_text(f"trap 'touch {tmp_path}/saved; kill $!; exit 0' TERM; sleep 600 & wait")
  process = script(config, tmp_path / "runs", environ=stand_in, wait=False)
  wait_until(lambda: calls(tmp_path))
  for _ in range(2):
    process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 143 and "stopped; run the same command to resume" in err
  assert (tmp_path / "saved").exists() and len(calls(tmp_path)) == 1


def test_a_dry_run_prints_the_commands(stand_in, tmp_path):
  config = config_file(tmp_path, RUNS)
  code, out, err = script(config, "runs", "--dry_run", environ=stand_in)
  assert (code, err, calls(tmp_path)) == (0, "", [])
  train = ["python", "-m", "flextok_jax.train"]
  assert [shlex.split(line) for line in out.splitlines()] == [train + words for words in expected_calls(config, "runs")]
  code, out, _ = script(config, "runs", "-n", "--only=c", "--launcher=submit 'as {name}'", environ=stand_in)
  assert code == 0 and shlex.split(out) == ["submit", "as c", *expected_calls(config, "runs")[1]]


def test_a_launcher_submits_each_run(stand_in, tmp_path):
  config = config_file(tmp_path, RUNS)
  launcher = "--launcher=submit --job-name='{name} of me' launch/slurm.sh"
  code, out, err = script(config, "runs", launcher, "--config.seed=3", environ=stand_in)
  assert (code, err) == (0, "") and out.endswith(": python -m flextok_jax.sweep --dir=runs\n")
  assert "to compare the runs after training: python" in out
  first = [[f"--job-name={name} of me", "launch/slurm.sh"] for name in ("a-b", "c", "d")]
  assert calls(tmp_path) == [a + b for a, b in zip(first, expected_calls(config, "runs", "--config.seed=3"))]
  code, _, err = script(config, "runs", "--launcher=false", "--only=a_B,d", environ=stand_in)
  assert code == 1 and err.endswith("error: failed runs: a_B d\n")


def test_on_a_tpu(made, tmp_path):  # noqa: F811
  """Through launch/tpu.sh to every worker."""
  config, tpu = config_file(tmp_path, RUNS), made.repo / "launch" / "tpu.sh"
  launcher = f"--launcher={tpu} run {' '.join(test_launch.NAMES)} --"
  code, _, err = script(config, "/mnt/runs", launcher, "--only=a_B", environ=made.environ)
  assert code == 0 and "training on t" in err
  wait_until(lambda: len(made.trainings()) == 2)
  words = expected_calls(config, "/mnt/runs")[0]
  assert [call["argv"] for call in made.trainings()] == [["-m", "flextok_jax.train", *words]] * 2


@pytest.mark.parametrize(
  "words, args",
  [
    ("launch/sweep.sh CONFIG DIR [flags], got 'x'", ("x",)),
    ("launch/sweep.sh CONFIG DIR [flags], got '--config=x y'", ("--config=x", "y")),
    ("--workdir=z: give the config and the folder of the runs as the first two arguments", ("x", "y", "--workdir=z")),
    ("configs/debug.py has no get_sweep()", ("configs/debug.py", "y")),
    ("unknown config key among --config.sed=3", ("configs/ablation_nested.py", "y", "--config.sed=3")),
  ],
)
def test_usage_errors_are_one_line(words, args, stand_in, tmp_path):
  code, out, err = script(*args, environ=stand_in)
  assert (code, out) == (2, "") and err.startswith("error: ") and words in err and err.count("\n") == 1
  assert calls(tmp_path) == []


def test_a_sweep_with_real_training(tmp_path):
  """A real run and one that fails; rerun, the first has nothing to do."""
  runs = {
    "uniform": {"tokens.nested_dropout": "uniform", "fast": False},
    "bad": {"tokens.nested_dropout": "pow2", "tokens.num_registers": 6, "fast": False},
  }
  config = config_file(tmp_path, runs)
  code, out, err = script(config, tmp_path / "runs")
  assert code == 1 and "error: nested_dropout 'pow2' needs" in err and err.endswith("error: failed runs: bad\n")
  text = (tmp_path / "runs" / "table.md").read_text()
  rows = rows_of(text, "Runs")
  assert rows["run"][:2] == ["steps", "loss"]  # with one run, no field differs
  assert set(rows) == {"run", "uniform"} and rows["uniform"][0] == "2"
  report = json.loads((tmp_path / "runs" / "uniform" / "eval" / "00000002" / "report.json").read_text())
  by_tokens = report["sets"]["synthetic"]["by_tokens"]
  assert list(by_tokens) == ["1", "4"]
  for metric, title, decimals in (("psnr", "PSNR dB", 2), ("ssim", "SSIM", 4), ("mae", "MAE", 4)):
    shown = rows_of(text, f"synthetic: {title}")["uniform"]
    assert shown == [f"{row[metric]:.{decimals}f}" for row in by_tokens.values()]
  last = [json.loads(line) for line in (tmp_path / "runs" / "uniform" / "metrics.jsonl").read_text().splitlines()]
  losses = [line["loss"] for line in last if "loss" in line]
  assert len(losses) == 2 and float(rows["uniform"][1]) == pytest.approx(losses[-1], rel=1e-3)

  written = lambda: [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("runs/*/weights.safetensors"))]
  before = written()
  assert len(before) == 1
  code, out, err = script(config, tmp_path / "runs", "--only=uniform")
  assert (code, err) == (0, "") and out.count("nothing to do: ") == 1
  assert written() == before and (tmp_path / "runs" / "table.md").read_text() == text
