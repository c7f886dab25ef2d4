"""HTML pages of one file: pictures and curves are inside, and nothing is loaded from elsewhere."""

import base64
import html

_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 1400px; margin: 2em auto; padding: 0 1em; color: #202020 }
img { max-width: 100% } table { border-collapse: collapse } td, th { padding: 2px 12px; text-align: right }
tr { border-bottom: 1px solid #e0e0e0 } td:first-child, th:first-child { text-align: left }
"""


def page(title: str, body: list[str], style: str = "", refresh: int = 0) -> bytes:
  """Returns a page.

  Args:
    title: plain text.
    body: HTML.
    style: more CSS.
    refresh: seconds after which a browser reads the page again; 0: never.
  """
  again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
  head = f'<meta charset="utf-8">{again}<title>{html.escape(title)}</title><style>{_STYLE}{style}</style>'
  return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{chr(10).join(body)}\n</body></html>\n'.encode()


def picture(name: str, data: bytes, kind: str = "png", css: str = "") -> str:
  """Returns an <img>, of a CSS class if one is given, that holds the bytes of a picture file."""
  of_class = f'class="{css}" ' if css else ""
  return f'<img {of_class}alt="{html.escape(name)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
