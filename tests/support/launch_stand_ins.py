"""Stand-ins for the programs that the launchers call: launch_stand_ins.py NAME FOLDER [arguments of NAME].

Everything happens in FOLDER. Each call adds a line to FOLDER/calls.jsonl; FOLDER/cloud.json is the state of the cloud:

  {"nodes": {NAME: STATE}, "requests": {NAME: [STATE, NODE, INITIATOR]}, "workers": 2, "fail": {"scp": 1, ...}}

`gcloud` runs ssh commands in FOLDER/hosts/TPU/N, the home of worker N; `uv` installs `train` there as the environment's
Python, which does what FOLDER/train says: finish, fail, or run (until SIGTERM, then it saves and exits with 0).
"""

import fcntl
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time


def record(folder: Path, **call):
  with open(folder / "calls.jsonl", "a") as f:
    f.write(json.dumps(call) + "\n")


def flag(arguments: list, name: str, default=None):
  return next((a.split("=", 1)[1] for a in arguments if a.startswith(f"--{name}=")), default)


def gcloud(folder: Path, arguments: list) -> int:
  record(folder, program="gcloud", argv=arguments)
  assert arguments[:2] == ["compute", "tpus"], arguments
  kind, verb, *rest = arguments[2:]
  with open(folder / "cloud.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    cloud = json.loads((folder / "cloud.json").read_text())
    code = cloud["fail"].get(verb, 0)
    if not code and verb not in ("ssh", "scp"):
      code = administer(cloud, folder, kind, verb, rest)
      (folder / "cloud.json").write_text(json.dumps(cloud))
  if code:
    print(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) no luck", file=sys.stderr)
    return code
  return {"ssh": ssh, "scp": scp}[verb](cloud, folder, rest) if verb in ("ssh", "scp") else 0


def administer(cloud: dict, folder: Path, kind: str, verb: str, rest: list) -> int:
  """Lists, creates and deletes; returns the exit code."""
  nodes, requests, name = cloud["nodes"], cloud["requests"], rest[0]
  assert flag(rest, "zone"), "no zone"
  if verb == "list":
    rows = [[n, s] for n, s in nodes.items()] if kind == "tpu-vm" else [[n, *r] for n, r in requests.items()]
    print("".join("\t".join(row) + "\n" for row in rows), end="")
  elif verb == "create":
    if name in (nodes if kind == "tpu-vm" else requests):
      return 1
    nodes[name] = "READY"
    if kind == "queued-resources":
      requests[name] = ["ACTIVE", flag(rest, "node-id"), ""]
  else:
    assert verb == "delete"
    if name not in (nodes if kind == "tpu-vm" else requests):
      return 1
    if kind == "queued-resources":
      name = requests.pop(name)[1]
    nodes.pop(name, None)
    shutil.rmtree(folder / "hosts" / name, ignore_errors=True)
  return 0


def homes(cloud: dict, folder: Path, name: str, which: str) -> list:
  if cloud["nodes"].get(name) != "READY":
    return []
  found = [folder / "hosts" / name / str(i) for i in range(cloud["workers"])]
  for home in found:
    home.mkdir(parents=True, exist_ok=True)
  return found if which == "all" else [found[int(which)]]


def ssh(cloud: dict, folder: Path, rest: list) -> int:
  command = flag(rest, "command")
  hosts = homes(cloud, folder, rest[0], flag(rest, "worker"))
  children = []
  for home in hosts:
    environ = {"HOME": str(home), "PATH": os.environ["PATH"], "STAND_INS": str(folder)}
    children.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=environ, stdin=subprocess.DEVNULL))
  codes = [child.wait() for child in children]
  return next((code for code in codes if code), 0 if hosts else 1)


def scp(cloud: dict, folder: Path, rest: list) -> int:
  name, path = rest[1].split(":")
  hosts = homes(cloud, folder, name, flag(rest, "worker"))
  for home in hosts:
    shutil.copy(rest[0], home / path)
  return 0 if hosts else 1


def uv(folder: Path, arguments: list) -> int:
  record(folder, program="uv", argv=arguments, cwd=os.getcwd())
  refuse = folder / "uv_refuses"  # the home of a worker on which installation fails
  if refuse.exists() and refuse.read_text() == os.environ["HOME"]:
    return 1
  if arguments[0] == "venv":
    python = Path(arguments[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(shutil.which("train"), python)
  return 0


def train(folder: Path, arguments: list) -> int:
  kept = ("HOME", "XLA_FLAGS", "NCCL_DEBUG", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_LOCAL_DEVICE_IDS", "SLURM_PROCID")
  environ = {name: os.environ[name] for name in kept if name in os.environ}
  received = []
  signal.signal(signal.SIGTERM, lambda *_: received.append(time.monotonic()))
  record(folder, program="python", argv=arguments, cwd=os.getcwd(), environ=environ)
  if arguments[:2] != ["-m", "flextok_jax.train"]:
    return 0  # pip, and the check for jax
  print("step 1", flush=True)
  while not received:
    if not Path(os.environ["HOME"]).is_dir():
      return 137  # its TPU was deleted
    todo = (folder / "train").read_text()
    if todo != "run":
      return {"finish": 0, "fail": 3}[todo]
    time.sleep(0.02)
  time.sleep(0.1)  # time for another signal to arrive
  record(folder, program="saved", argv=arguments, signals=len(received))
  return 0


def srun(folder: Path, arguments: list) -> int:
  """Starts the tasks here; if FOLDER/preempt exists, all of them get SIGTERM once all are running."""
  record(folder, program="srun", argv=arguments)
  command = list(arguments)
  while command[0].startswith("--"):
    command.pop(0)
  count = int(flag(arguments, "ntasks"))
  tasks = [
    subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(i)}, start_new_session=True) for i in range(count)
  ]
  if (folder / "preempt").exists():
    trains = 0
    while trains < count:
      time.sleep(0.02)
      trains = (folder / "calls.jsonl").read_text().count('"flextok_jax.train"') - 1  # srun's own line contains it too
    for task in tasks:
      os.killpg(task.pid, signal.SIGTERM)
  return max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks])


def scontrol(folder: Path, arguments: list) -> int:
  record(folder, program="scontrol", argv=arguments)
  if "show" in arguments:
    print((folder / "job").read_text())
  return 0


if __name__ == "__main__":
  sys.exit(globals()[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:]))
