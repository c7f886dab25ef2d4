"""Serves the demo's page: loopback unless asked otherwise, nothing from outside, no file but uploads."""

import os
import re
import signal
import socket
import tempfile
import threading
from typing import Any

import gradio as gr

from flextok_jax.tools.demo import html
from flextok_jax.tools.demo import page as page_lib
from flextok_jax.tools.demo.model import Models

MAX_UPLOAD = 10 * 2**20  # bytes
_QUEUE = dict(max_size=32, default_concurrency_limit=4)
_SESSIONS = 100
_POLICY = (  # of the browser: nothing is loaded from elsewhere, whatever gradio's own page asks for
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
  "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
  "form-action 'self'"
)
_OUTSIDE = re.compile(r"/proxy=|/file=\w+:", re.IGNORECASE)  # routes by which gradio would open addresses


class _Closed:
  """ASGI middleware: adds the policy, and refuses to open addresses for a client."""

  def __init__(self, app: Any):
    self._app = app

  async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
    if scope["type"] == "http" and _OUTSIDE.search(scope["path"]):
      await send({"type": "http.response.start", "status": 403, "headers": []})
      await send({"type": "http.response.body", "body": b"refused"})
      return

    async def send_with_policy(message: dict) -> None:
      if message["type"] == "http.response.start":
        message = message | {"headers": [*message["headers"], (b"content-security-policy", _POLICY.encode())]}
      await send(message)

    await self._app(scope, receive, send_with_policy)


def check_port(host: str, port: int) -> None:
  """Raises ValueError unless a server can listen there."""
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind((host, port))
    except OSError as e:
      raise ValueError(f"port={port} of host={host} cannot be used ({e.strerror}): give another") from None


def start(models: Models, folder: str, host: str, port: int, share: bool = False) -> tuple[gr.Blocks, str]:
  """Starts the server in a thread; returns the page, whose close() ends it, and its address.

  Args:
    models: what it shows.
    folder: for uploads, the only files that are served.
    host: address to listen on.
    port: to listen on.
    share: whether gradio's servers pass a public address on to it.

  Raises:
    OSError: the port cannot be used.
  """
  os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
  page = page_lib.build(models)
  page.queue(**_QUEUE)
  font = ["system-ui", "sans-serif"]  # names of fonts that are there: no font is loaded
  _, local, public = page.launch(
    server_name=host,
    server_port=port,
    share=share,
    prevent_thread_lock=True,
    quiet=True,
    max_file_size=MAX_UPLOAD,
    allowed_paths=[],
    state_session_capacity=_SESSIONS,
    enable_monitoring=False,
    run_history=False,
    ssr_mode=False,
    mcp_server=False,
    pwa=False,
    footer_links=[],
    theme=gr.themes.Default(primary_hue="indigo", font=font, font_mono=["ui-monospace", "monospace"]),
    css=html.CSS,
    app_kwargs={"middleware": [(_Closed, (), {})]},
  )
  return page, public or local


def run(models: Models, host: str, port: int, share: bool) -> None:
  """Serves the page until the process is stopped by SIGINT or SIGTERM."""
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  with tempfile.TemporaryDirectory(prefix="flextok_demo_") as folder:
    page, address = start(models, folder, host, port, share)
    print(f"open {address} in a browser; Ctrl-C ends the demo", flush=True)
    try:
      threading.Event().wait()
    finally:
      page.close(verbose=False)
