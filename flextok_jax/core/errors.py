"""Error messages of other libraries, shortened for one-line messages of ours."""


def first_line(error: str | Exception, limit: int | None = None) -> str:
  """Returns the first line of an error's message, at most `limit` characters; its type if it has no message."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]
