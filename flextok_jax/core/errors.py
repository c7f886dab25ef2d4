"""Error messages of other libraries, shortened for one-line messages of ours."""


def first_line(error: Exception, limit: int = 200) -> str:
  """Returns the first line of an exception's message, at most `limit` characters."""
  return (str(error).strip().splitlines() or [""])[0][:limit]
