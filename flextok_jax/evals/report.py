"""Reports of evaluations and studies: results, tables and pictures, as files and as one document."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flextok_jax.core import files, pages
from flextok_jax.core.tables import markdown_table
from flextok_jax.evals import grids

_MAX_WIDTH = 4096  # pixels of pictures in the document of studies; wider ones are reduced


@dataclasses.dataclass(frozen=True)
class Table:
  """A table: cells are numbers, texts, [mean, low, high] with an interval, or None if there is no value."""

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[float | int | str | Sequence[float] | None]]

  def to_text(self) -> str:
    """Returns the table for a terminal: the title, and right-aligned columns."""
    cells = self._cells()
    widths = [max(8, *map(len, column)) for column in zip(*cells)]
    lines = [" ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]
    return "\n".join([self.title, *lines])

  def to_markdown(self) -> str:
    """Returns the table in Markdown, below its title."""
    header, *rows = self._cells()
    return f"**{self.title}**\n\n{markdown_table(header, rows, numbers=True)}"

  def to_html(self) -> str:
    """Returns the table in HTML, below its title."""
    header, *rows = self._cells()
    line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    lines = [line("th", header), *(line("td", row) for row in rows)]
    return "\n".join([f"<h3>{html.escape(self.title)}</h3>", "<table>", *lines, "</table>"])

  def _cells(self) -> list[Sequence[str]]:
    return [self.columns, *([_to_text(value) for value in row] for row in self.rows)]


@dataclasses.dataclass(frozen=True)
class Report:
  """Results of an evaluation or a study.

  Attributes:
    scores: JSON-able results.
    tables: the results for people.
    pictures: {end of the file's name: function that draws the picture}, called when it is written.
    scalars: flat numbers for a metric writer.
    examples: {set: {column: uint8 [g, h, w, 3]}}, images that the pictures show.
    notes: sentences below the tables.
  """

  scores: dict[str, Any]
  tables: Sequence[Table]
  pictures: Mapping[str, Callable[[], bytes | Image.Image]]
  scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
  examples: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)
  notes: Sequence[str] = ()

  def table(self) -> str:
    """Returns the tables and notes for a terminal."""
    return "\n\n".join([*(table.to_text() for table in self.tables), *self.notes])

  def write(self, folder: str | Path, settings: Mapping[str, Any] | None = None, name: str = "report") -> list[Path]:
    """Writes NAME.json, with settings and scores, and the pictures; returns the paths."""
    folder = Path(folder)
    contents = {
      f"{name}.json": (json.dumps({**(settings or {}), **self.scores}, indent=2, default=str) + "\n").encode()
    }
    for file, draw in self.pictures.items():
      picture = draw()
      contents[file] = picture if isinstance(picture, bytes) else grids.to_png(picture)
    for file, content in contents.items():
      files.write_file(folder / file, content)
    return [folder / file for file in contents]


def make_study_report(
  name: str,
  title: str,
  about: str,
  tables: Sequence[Table],
  figure: Callable[[], bytes],
  grid: Callable[[], Image.Image] | None = None,
) -> Report:
  """Returns the report of a study, which write_document can join with others.

  Args:
    name: of the study and its files.
    title, about: heading, and a paragraph that explains what is shown.
    figure, grid: draw NAME.png and NAME_grid.png, if there is one.
  """
  pictures: dict[str, Callable[[], bytes | Image.Image]] = {f"{name}.png": figure}
  if grid is not None:

    def reduced():
      picture = grid().copy()
      picture.thumbnail((_MAX_WIDTH, picture.height))
      return picture

    pictures[f"{name}_grid.png"] = reduced
  scores = {"title": title, "about": about, "tables": [dataclasses.asdict(table) for table in tables]}
  return Report(scores, tables, pictures)


def write_document(folder: Path, names: Sequence[str]) -> list[Path]:
  """Joins the studies in a folder in report.md and report.html, which contains its pictures.

  Args:
    names: of studies, in the order of the document; those without NAME.json are left out.

  Returns:
    The paths written.
  """
  markdown, page = ["# Studies"], ["<h1>Studies</h1>"]
  for name in names:
    if not (folder / f"{name}.json").is_file():
      continue
    study = json.loads((folder / f"{name}.json").read_bytes())
    pictures = [picture for picture in (f"{name}.png", f"{name}_grid.png") if (folder / picture).is_file()]
    markdown += [f"## {study['title']}", study["about"], *(f"![]({picture})" for picture in pictures)]
    page += [f"<h2>{html.escape(study['title'])}</h2>", f"<p>{html.escape(study['about'])}</p>"]
    for picture in pictures:
      page.append(f"<p>{pages.picture(picture, (folder / picture).read_bytes())}</p>")
    for table in (Table(**fields) for fields in study["tables"]):
      markdown.append(table.to_markdown())
      page.append(table.to_html())
    settings = json.dumps(study["settings"], indent=1)
    markdown += ["Settings:", f"```json\n{settings}\n```"]
    page.append(f"<details><summary>Settings</summary><pre>{html.escape(settings)}</pre></details>")
  paths = [folder / "report.md", folder / "report.html"]
  files.write_file(paths[0], ("\n\n".join(markdown) + "\n").encode())
  files.write_file(paths[1], pages.page("Studies", page))
  return paths


def _to_text(value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, list):
    mean, *interval = map(_to_text, value)
    return mean + (f" ({' to '.join(interval)})" if interval else "")
  return f"{value:.4g}" if isinstance(value, float) else str(value)
