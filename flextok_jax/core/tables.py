"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
  """Returns a table.

  Args:
    header: names of the columns.
    rows: of as many cells each.
    numbers: whether all columns but the first are aligned to the right.
  """
  rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
  return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in (header, rule, *rows))
