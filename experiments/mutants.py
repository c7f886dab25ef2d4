"""Does any damaged file do more than fail with one line? Damages files of a kind at random and reads them.

python -m experiments.mutants --kind=pictures --count=100000 [--seed=0] [--only=NUMBER]

Each mutant is read in a folder of its own. A reader returns, or raises an error of the kinds that commands report,
whose message is one line. Anything else is an escape: another exception, a crash, more than 10 s, more than 1 GB of
memory, a file written outside the folder, a program started, a connection opened. Prints the first escapes of each kind
with their numbers, and the counts; the exit code is 1 if there was any. --only=NUMBER reads one mutant and shows the
traceback.
"""

import argparse
import collections
from collections.abc import Callable
import contextlib
import json
import os
from pathlib import Path
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np

from flextok_jax import cli
from flextok_jax.data import transforms
from flextok_jax.data.sources import base
from tests.support import config_mutants, source_mutants, token_mutants, weights_mutants
from tests.support.mutations import mutate
from tests.support.pictures import samples

SECONDS = 10  # per mutant
MEMORY = 2**30  # bytes of growth over all mutants of a process
EXPECTED = (*cli._EXPECTED, base.UnreadableRecord)
MAX_LINE = 1000  # characters of a message


def pictures(rng: random.Random, folder: Path):
  """Reads a picture of a random format as training does, from a folder and with a caption beside it."""
  name, data = rng.choice(sorted(samples().items()))
  (folder / name).write_bytes(mutate(data, rng))
  (folder / "caption.txt").write_bytes(b"a caption")
  with open(folder / name, "rb") as f:
    image = transforms.random_resized_crop(f, 32, np.random.default_rng(0), 0.3, reduce=rng.random() < 0.5)
  assert image.shape == (32, 32, 3) and image.dtype == np.uint8


# name: function(rng, folder) that damages files with rng alone, and reads them; it writes into the folder only.
KINDS: dict[str, Callable[[random.Random, Path], None]] = {
  "pictures": pictures,
  "token_files": token_mutants.token_file,
  "npz": token_mutants.npz,
  "shards": token_mutants.shards,
  "tars": source_mutants.tars,
  "texts": source_mutants.texts,
  "config_json": config_mutants.config_json,
  "yaml": config_mutants.yaml,
  "safetensors": weights_mutants.safetensors,
  "hub_config": weights_mutants.hub_config,
  "tokenizer_json": weights_mutants.tokenizer_json,
  "orbax_items": weights_mutants.orbax_items,
}


def empty(folder: Path) -> Path:
  """Returns the folder without what was in it."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  return folder


def run_one(kind: str, seed: int, number: int, folder: Path):
  """Makes and reads one mutant, with the files in an empty folder."""
  KINDS[kind](random.Random(f"{kind} {seed} {number}"), folder)


def watch(folder: Path, found: list[str]):
  """Notes in `found` what this process does outside of the folder from now on."""
  shown = re.compile(r"/dev/|/proc/|.*\.pyc")

  def hook(event, args):
    if event == "open":
      path, _, flags = args
      writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
      path, writes = args[0] if args else "", event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink")
    if writes and isinstance(path, (str, bytes, os.PathLike)):
      path = os.path.abspath(os.fsdecode(path))
      if not path.startswith(f"{folder}{os.sep}") and path != str(folder) and not shown.match(path):
        found.append(f"{event} {path}")
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect"):
      found.append(f"{event} {args}")

  sys.addaudithook(hook)


def read_mutants(kind: str, seed: int, start: int, count: int, root: Path):
  """Reads mutants and prints one JSON line [number, escape or "", type of the error] for each; runs in a child."""
  outside: list[str] = []
  folder, report = root / "work", os.dup(1)
  os.dup2(2, 1)  # decoders print warnings
  for warm in range(3):  # imports and compiles what is needed, before memory is measured
    with contextlib.suppress(Exception):
      run_one(kind, seed, -1 - warm, empty(folder))
  watch(folder, outside)
  size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY,) * 2)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with os.fdopen(report, "w", buffering=1) as lines:
    for number in range(start, start + count):
      empty(folder)
      outside.clear()
      escape, outcome = "", "read"
      signal.alarm(SECONDS)
      try:
        run_one(kind, seed, number, folder)
      except EXPECTED as error:
        outcome = type(error).__name__
        if len(str(error).splitlines()) != 1 or len(str(error)) > MAX_LINE:
          escape = f"not one line: {str(error)[:200]!r}"
      except BaseException as error:
        escape = f"{type(error).__name__}: {str(error)[:200]!r}"
      signal.alarm(0)
      grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
      escape = escape or "; ".join(outside) or (f"{grown / 2**20:.0f} MiB of memory" if grown > MEMORY else "")
      print(json.dumps([number, escape, outcome, grown]), file=lines)
      if grown > MEMORY:
        break  # another process goes on


def main(kind: str, count: int, seed: int, only: int | None) -> int:
  with tempfile.TemporaryDirectory() as root:
    root = Path(root).resolve()
    if only is not None:
      run_one(kind, seed, only, empty(root / "work"))
      print("read")
      return 0
    (root / "outside").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HOME": str(root / "outside"), "JAX_PLATFORMS": "cpu"}
    outcomes: collections.Counter = collections.Counter()
    done, escapes, most = 0, 0, 0
    while done < count:
      arguments = [kind, str(seed), str(done), str(count - done), str(root)]
      command = [sys.executable, "-m", "experiments.mutants", "--child", *arguments]
      options = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
      with subprocess.Popen(command, env=environment, **options) as child:
        for line in child.stdout:
          number, escape, outcome, grown = json.loads(line)
          done, most = number + 1, max(most, grown)
          outcomes[escape[:60] or outcome] += 1
          escapes += bool(escape)
          if escape and outcomes[escape[:60]] <= 3:
            print(f"mutant {number}: {escape}", flush=True)
      if child.returncode:
        cause = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit code {child.returncode}"
        print(
          f"mutant {done}: {f'over {SECONDS} s' if cause == 'SIGALRM' else f'the process died: {cause}'}", flush=True
        )
        done, escapes = done + 1, escapes + 1
      if left := sorted(
        path.name for path in (*root.iterdir(), *(root / "outside").iterdir()) if path.name not in ("work", "outside")
      ):
        print(f"written outside the folder before mutant {done}: {', '.join(left)}")
        escapes += 1
        break
  print(f"{kind}: {count} mutants, {escapes} escapes; {dict(outcomes)}; {most / 2**20:.0f} MiB of memory at most")
  return int(escapes > 0)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    read_mutants(sys.argv[2], *map(int, sys.argv[3:6]), Path(sys.argv[6]))
  else:
    parser = argparse.ArgumentParser(usage="\n".join(__doc__.splitlines()[2:3]))
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    sys.exit(main(**vars(parser.parse_args())))
