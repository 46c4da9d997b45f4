"""A Hub of this machine: as much of its HTTP API as creating a repository and committing files to it takes."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "x" * 34


class Hub(ThreadingHTTPServer):
    """Repositories by name: whether they are `private`, their `files`, and the `commits` that brought them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.fail_commits = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        super().__exit__(*error)


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(body)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/").partition("/revision/")[0]
        repo = self.server.repos.get(name)
        if repo is None:
            self._answer(404, {"error": "Repository not found"})
        else:
            self._answer(200, {"id": name, "modelId": name, "private": repo["private"], "sha": "0" * 40, "tags": []})

    def do_POST(self) -> None:
        body = self._read()
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish['organization'] or 'me'}/{wish['name']}"
            known = name in self.server.repos
            private = wish.get("private") or wish.get("visibility") == "private"
            self.server.repos.setdefault(name, {"private": bool(private), "files": {}, "commits": []})
            self._answer(409 if known else 200, {"url": f"{self.server.endpoint}/{name}"})
        elif path == "/api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._answer(404, {"error": f"no {path} here"})

    def _commit(self, name: str, body: bytes) -> None:
        if self.server.fail_commits:
            self.server.fail_commits -= 1
            self._answer(403, {"error": "You have exceeded your storage limit."})
            return
        lines = [json.loads(line) for line in body.splitlines()]
        repo = self.server.repos[name]
        repo["commits"].append(next(line["value"]["summary"] for line in lines if line["key"] == "header"))
        for line in lines:
            if line["key"] == "file":
                repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        number = f"{len(repo['commits']):040x}"
        url = f"{self.server.endpoint}/{name}/commit/{number}"
        self._answer(200, {"commitUrl": url, "commitOid": number, "hookOutput": "", "success": True})
