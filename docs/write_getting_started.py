"""Writes docs/getting-started.md and its pictures: runs what it shows, in an empty folder, and records the output.

python docs/write_getting_started.py
"""

import code
import contextlib
import io
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile

from PIL import Image

DOCS = Path(__file__).parent
LONGEST = 14  # lines of an output
_INTERPRETER = code.InteractiveInterpreter()

TEXT = """# The first ten minutes

Everything below was run exactly as shown, on two CPU cores, with the small models that ship; `python
docs/write_getting_started.py` runs it again. Install the package from a clone, with Python 3.11 or newer:

```bash
pip install .
```

## Draw pictures

A generator draws tokens for a caption, a tokenizer decodes them. Models that ship have short names; a path, a run's
workdir or a repository of the Hugging Face hub works in their place.

$ python -m flextok_jax.sample --checkpoint=glyphs_text --tokenizer=glyphs_student --num_samples=4 \\
    --prompts="cactus, flat;grinning face, flat" --out=drawn

Each row of `drawn/grid.png` is a sample, decoded from its first tokens. The generator ends a sequence by itself: the
simpler the picture, the fewer tokens.

![Samples from their first tokens](images/first_samples.png)

## A picture as tokens, coarse to fine

>>> import flextok_jax
>>> model = flextok_jax.load("glyphs_student")
>>> model
>>> from pathlib import Path
>>> paths = sorted(Path("drawn").glob("0*.png"))
>>> ids = model.tokenize(paths)
>>> ids.shape
>>> ids[0]
>>> prefixes = [ids[4, :k] for k in (1, 2, 4, 8, 16, 32)]
>>> images = model.detokenize(prefixes, key=0)
>>> flextok_jax.show_grid(images, [f"{len(p)} tokens" for p in prefixes]).save("prefixes.png")

Any number of tokens, from the first, decodes to a whole picture:

![One picture from 1, 2, 4, 8, 16 and 32 tokens](images/first_prefixes.png)

How many tokens does each picture need? Fewer, where it is simple:

>>> short = model.tokenize(paths, quality=0.12)
>>> [len(row) for row in short]

The generator from Python, one sample for each caption:

>>> generator = flextok_jax.load_ar("glyphs_text")
>>> generator
>>> drawn = generator.generate(7, prompts=["soccer ball, flat"])
>>> generator.trim(drawn)
>>> pictures = flextok_jax.to_pil(model.detokenize(generator.trim(drawn), key=0))

## Train on pictures of your own

A folder is all that is needed; its subfolders are classes. `debug` is a model that trains in seconds and shows nothing
but that everything works; [Training](training.md) has the real ones.

$ python -m flextok_jax.train --config=debug --data=drawn --workdir=run

Killed or finished, a run goes on from its newest checkpoint, with new settings if you like:

$ python -m flextok_jax.train --config=run/config.json --workdir=run --config.train.num_steps=30

`run/report.html` shows its curves and pictures while it trains, and every command takes the workdir in place of a
model:

$ python -m flextok_jax.evaluate --workdir=run --data=drawn --num_tokens=1,4

## Next

- [In the browser](demo.md): `python -m flextok_jax.demo`
- [Commands and configs](commands.md): `python -m flextok_jax.train --help` lists every field,
  `--config=NAME --print_config` prints a config with comments
- [Generators](generators.md), [search](search.md), [few-step decoding](students.md), [training](training.md)
"""

PICTURES = {"first_samples.png": "drawn/grid.png", "first_prefixes.png": "prefixes.png"}


def run_command(command: str) -> str:
  """Runs a command and returns the lines that it prints."""
  line = command.replace("python -m", f"{sys.executable} -m", 1)
  done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f"{command}\n{done.stdout}{done.stderr}")
  lines = [line.rstrip() for line in done.stdout.strip().splitlines()]
  if len(lines) > LONGEST:
    lines = [*lines[: LONGEST // 2], "...", *lines[-LONGEST // 2 :]]
  return "\n".join(lines)


def run_python(statement: str) -> str:
  """Runs a statement as an interactive session does and returns what it prints."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    unfinished = _INTERPRETER.runsource(statement)
  if unfinished:
    raise SystemExit(f"not a whole statement: {statement}")
  return out.getvalue().rstrip()


def main() -> None:
  """Runs TEXT and writes the page."""
  page, session = [], False
  lines = iter(TEXT.replace(" \\\n    ", " \\\n").splitlines())
  with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    for line in lines:
      is_python = line.startswith(">>> ")
      if session != is_python:
        page.append("```python" if is_python else "```")
        session = is_python
      if line.startswith("$ "):
        command = line[2:]
        while command.endswith("\\"):
          command += "\n" + next(lines)
        output = run_command(command.replace("\\\n", ""))
        shown = command.replace("\\\n", "\\\n    ")
        page += ["```bash", shown, "```", "", "```text", output, "```"]
      elif is_python:
        page += [line, *filter(None, run_python(line[4:]).splitlines())]
      else:
        page.append(line)
    text = "\n".join(page) + "\n"
    for name, path in PICTURES.items():
      picture = Image.open(path)
      picture.quantize(255, dither=Image.Dither.NONE).save(DOCS / "images" / name, optimize=True)
    text = text.replace(os.path.realpath(folder) + "/", "").replace(folder + "/", "")
    (DOCS / "getting-started.md").write_text(re.sub(r"[ \t]+\n", "\n", text), encoding="utf-8")


if __name__ == "__main__":
  main()
