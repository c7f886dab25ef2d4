"""A server on loopback with the part of the Hugging Face hub's protocol that uploads and downloads of files need."""

import base64
import collections
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import threading
from urllib.parse import unquote


class HubServer:
  """A context manager; `files` are {repository: {revision: {path: bytes}}}, `requests` the lines that were served."""

  def __init__(self):
    self.files = collections.defaultdict(lambda: {"main": {}})
    self.requests = []
    handler = type("Handler", (_Handler,), {"hub": self})
    self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *error):
    self._server.shutdown()
    self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
  hub: HubServer
  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    pass

  def _reply(self, content, code=200, **headers):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(code)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def _path(self):
    self.hub.requests.append(f"{self.command} {self.path}")
    return [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]

  def do_HEAD(self):  # noqa: N802 named by http.server
    self.do_GET()

  def do_GET(self):  # noqa: N802
    parts = self._path()
    if parts[0] == "api":  # api/models/ORGANISATION/NAME/...
      self._reply({"id": "/".join(parts[2:4]), "sha": "0" * 40, "siblings": [], "private": False})
      return
    organisation, name, _, revision, *path = parts  # ORGANISATION/NAME/resolve/REVISION/PATH
    content = self.hub.files[f"{organisation}/{name}"].get(revision, {}).get("/".join(path))
    commit = hashlib.sha1(revision.encode()).hexdigest()
    if content is None:
      self._reply(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
    else:
      self._reply(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

  def do_POST(self):  # noqa: N802
    parts = self._path()
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if parts[1] == "repos":  # api/repos/create
      fields = json.loads(body)
      repository = f"{fields['organization']}/{fields['name']}"
      self.hub.files[repository]  # noqa: B018 made by the look-up
      self._reply({"url": f"{self.hub.address}/{repository}", "name": repository})
      return
    if parts[1] == "validate-yaml":  # of a model card
      self._reply({"errors": [], "warnings": []})
      return
    repository, action, revision = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
    if action == "branch":
      self.hub.files[repository].setdefault(revision, {})
      self._reply({})
    elif action == "preupload":
      asked = json.loads(body)["files"]
      self._reply(
        {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked]}
      )
    elif action == "commit":
      for line in body.splitlines():
        entry = json.loads(line)
        if entry["key"] == "file":
          content = base64.b64decode(entry["value"]["content"])
          self.hub.files[repository][revision][entry["value"]["path"]] = content
      url = f"{self.hub.address}/{repository}/commit/{'1' * 40}"
      self._reply({"success": True, "commitOid": "1" * 40, "commitUrl": url})
    else:
      self._reply(b"", 404)
