"""What studies found, on disk: parts by which a killed study goes on, files of each study, one report of all."""

import base64
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import html
import io
import json
from pathlib import Path
import time
from typing import Any

import numpy as np
from PIL import Image

from flextok_jax.core import files
from flextok_jax.evals import plots

PARTS = "parts"  # folder
_MAX_WIDTH = 4096  # pixels of a grid; a wider one is made smaller
Found = tuple[Any, dict[str, np.ndarray]]  # what JSON can hold, and arrays


@dataclasses.dataclass(frozen=True)
class Table:
  """Numbers with a header: rows hold numbers, texts, [mean, low, high] with an interval, None where there is none."""

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[float | int | str | Sequence[float] | None]]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a study found: a title, what is shown, tables, a figure (PNG) and a grid of pictures."""

  title: str
  about: str
  tables: Sequence[Table]
  figure: bytes
  grid: Image.Image

  def write(self, folder: Path, name: str, settings: Mapping[str, Any]) -> list[Path]:
    """Writes NAME.json, NAME.png and NAME_grid.png; returns their paths."""
    shrunk = self.grid.copy()
    shrunk.thumbnail((_MAX_WIDTH, self.grid.height))
    tables = [dataclasses.asdict(table) for table in self.tables]
    fields = {"title": self.title, "about": self.about, "settings": dict(settings), "tables": tables}
    contents = {
      f"{name}.json": (json.dumps(fields, indent=1, default=str) + "\n").encode(),
      f"{name}.png": self.figure,
      f"{name}_grid.png": plots.to_png(shrunk),
    }
    for file, content in contents.items():
      files.write_file(folder / file, content)
    return [folder / file for file in contents]


class Parts:
  """Keeps what each part of a study found in a file of its own, so that a run that was killed goes on after it.

  Args:
    folder: of the report.
    settings: what decides all results: models, seeds, measures. A part found with others is computed again.
  """

  def __init__(self, folder: Path, settings: Mapping[str, Any]):
    self._folder, self.settings = folder / PARTS, dict(settings)

  def __call__(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Found]) -> Found:
    """Returns what was found before with the same settings, else what compute() finds; prints which."""
    key = json.dumps({**self.settings, **settings}, sort_keys=True, default=str)
    path = self._folder / f"{name}.npz"
    found = _read(path, key)
    if found is not None:
      print(f"{name}: found before with these settings ({path})", flush=True)
      return found
    start = time.monotonic()
    numbers, arrays = compute()
    numbers = json.loads(json.dumps(numbers))  # the same whether it was found before or not
    buffer = io.BytesIO()
    np.savez(buffer, settings=key, numbers=json.dumps(numbers), **{f"array_{k}": v for k, v in arrays.items()})
    files.write_file(path, buffer.getvalue())
    print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    return numbers, arrays


def gather(folder: Path, names: Sequence[str]) -> list[Path]:
  """Writes report.md and report.html, which needs no other file, of the studies that lie in a folder.

  Args:
    names: of studies, in the order of the report; those without NAME.json are left out.

  Returns:
    The paths written.
  """
  markdown, page = ["# Studies"], ["<h1>Studies</h1>"]
  for name in names:
    if not (folder / f"{name}.json").is_file():
      continue
    fields = json.loads((folder / f"{name}.json").read_bytes())
    markdown += [f"## {fields['title']}", fields["about"], f"![]({name}.png)", f"![]({name}_grid.png)"]
    page += [f"<h2>{html.escape(fields['title'])}</h2>", f"<p>{html.escape(fields['about'])}</p>"]
    for picture in (f"{name}.png", f"{name}_grid.png"):
      data = base64.b64encode((folder / picture).read_bytes()).decode()
      page.append(f'<p><img alt="{html.escape(picture)}" src="data:image/png;base64,{data}"></p>')
    for table in fields["tables"]:
      markdown += [f"**{table['title']}**", markdown_table(table["columns"], table["rows"])]
      page += [f"<h3>{html.escape(table['title'])}</h3>", _html_table(_cells(table["columns"], table["rows"]))]
    settings = json.dumps(fields["settings"], indent=1)
    markdown += ["Settings:", f"```json\n{settings}\n```"]
    page.append(f"<details><summary>Settings</summary><pre>{html.escape(settings)}</pre></details>")
  paths = [folder / "report.md", folder / "report.html"]
  files.write_file(paths[0], ("\n\n".join(markdown) + "\n").encode())
  files.write_file(paths[1], (_HEAD + "\n".join(page) + "\n</body></html>\n").encode())
  return paths


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
  """Returns columns and rows, as of Table, in Markdown."""
  header, *cells = _cells(columns, rows)
  rule = ["---"] + ["---:"] * (len(columns) - 1)
  return "\n".join(f"| {' | '.join(x.replace('|', '&#124;') for x in row)} |" for row in (header, rule, *cells))


def _cells(columns: Sequence[str], rows: Sequence[Sequence]) -> list[Sequence[str]]:
  return [columns, *([_text(value) for value in row] for row in rows)]


_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Studies</title><style>
body { font: 16px/1.5 sans-serif; max-width: 1400px; margin: 2em auto; padding: 0 1em; color: #202020 }
img { max-width: 100% } table { border-collapse: collapse } td, th { padding: 2px 12px; text-align: right }
tr { border-bottom: 1px solid #e0e0e0 } td:first-child, th:first-child { text-align: left }
</style></head><body>
"""


def _read(path: Path, key: str) -> Found | None:
  try:
    with np.load(path, allow_pickle=False) as file:
      if str(file["settings"]) != key:
        return None
      arrays = {name.removeprefix("array_"): file[name] for name in file.files if name.startswith("array_")}
      return json.loads(str(file["numbers"])), arrays
  except Exception:  # none there, or damaged in any way: computed again
    return None


def _text(value) -> str:
  if value is None:
    return "-"
  if isinstance(value, list):
    mean, *interval = map(_text, value)
    return mean + (f" ({' to '.join(interval)})" if interval else "")
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def _html_table(cells: Sequence[Sequence[str]]) -> str:
  row = lambda tag, values: "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"
  return "\n".join(["<table>", row("th", cells[0]), *(row("td", values) for values in cells[1:]), "</table>"])
