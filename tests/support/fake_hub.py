"""A hub of Hugging Face on loopback: accounts, repositories, and the three steps of an upload."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "fake" * 8


class FakeHub:
    """Use as a context manager. `repositories`: {OWNER/NAME: {"private": bool, "files": {path: bytes}}}; `fail`: a
    status that the commit is answered with."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.fail = 0
        self.paths: list[str] = []

    def __enter__(self) -> FakeHub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) of a request with a valid token."""
        name = "/".join(path.split("/")[3:5])
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "ann", "orgs": []}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'ann'}/{wanted['name']}"
            if name in self.repositories:
                return 409, {"error": "exists", "url": f"{self.address}/{name}"}
            self.repositories[name] = {"private": wanted.get("visibility") == "private", "files": {}}
            return 200, {"url": f"{self.address}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            found = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.address}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": found}
        if "/resolve/" in path:
            owner_name, _, rest = path.strip("/").partition("/resolve/")
            held, file = self.repositories.get(owner_name, {"files": {}})["files"], rest.partition("/")[2]
            return (200, held[file]) if file in held else (404, {"error": "Entry not found"})
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[name]
        if path.endswith("/preupload/main"):
            kinds = {True: "lfs", False: "regular"}
            files = [f["path"] for f in json.loads(body)["files"]]
            return 200, {
                "files": [
                    {"path": f, "uploadMode": kinds[f.endswith(".safetensors")], "shouldIgnore": False} for f in files
                ]
            }
        if path.endswith("/commit/main"):
            if self.fail:
                return self.fail, {"error": f"no room; your token is {TOKEN}"}
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository["files"][value["path"]] = self.blobs[value["oid"]]
            return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True}
        if "/tree/" in path:
            return 200, [
                {"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in repository["files"].items()
            ]
        siblings = [{"rfilename": path} for path in repository["files"]]
        return 200, {"id": name, "private": repository["private"], "siblings": siblings, "sha": "1" * 40}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def _reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.hub.paths.append(path)
        if path.startswith("/lfs/") or self.headers.get("Authorization") == f"Bearer {TOKEN}":
            status, told = self.hub.answer(self.command, path, body)
        else:
            status, told = 401, {"error": "Invalid credentials"}
        data = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
        if "/resolve/" in path:
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _reply

    def log_message(self, *_: object) -> None:
        pass
