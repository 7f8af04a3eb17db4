"""A model hub and a package index on loopback: what huggingface_hub and pip ask for, and ways to fail."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`with FakeHub() as hub:` serves `repos` {id: {file: bytes}} and `wheels` {file: bytes} at `url`.

    `faults` {file: fault} spoils the GET of a file: "stall" sends half of it, sets `stalled` and waits for
    `release`; "cut" sends half and hangs up, once; a number is an HTTP status. A repository in `gated` is
    refused; `sizes` {file: bytes} is what the hub claims. `log` has every request as "METHOD /path".
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.wheels: dict[str, bytes] = {}
        self.faults: dict[str, str | int] = {}
        self.gated: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.log: list[str] = []
        self.tokens: set[str] = set()
        self.stalled, self.release = threading.Event(), threading.Event()

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            def do_HEAD(self):
                hub.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.release.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """The names of the files whose bytes were asked for, in order."""
        gets = (line for line in self.log if line.startswith("GET ") and "/api/" not in line)
        return [line.rpartition("/")[2] for line in gets]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        self.log.append(f"{request.command} /{path}")
        if token := request.headers.get("Authorization"):
            self.tokens.add(token)
        parts = path.split("/")
        if parts[0] == "simple":
            links = (f'<a href="{self.url}/files/{file}">{file}</a>' for file in self.wheels)
            self.send(request, 200, "".join(links).encode(), {"Content-Type": "text/html"})
        elif parts[0] == "files" and parts[1] in self.wheels:
            self.send_file(request, parts[1], self.wheels[parts[1]])
        elif parts[:2] == ["api", "models"] and len(parts) >= 6:
            self.send_info(request, "/".join(parts[2:4]), "/".join(parts[5:]))
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.send_repo_file(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.send(request, 404)

    def send_info(self, request, repo: str, revision: str) -> None:
        if repo not in self.repos:
            return self.send(request, 404, headers={"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self.send(request, 404, headers={"X-Error-Code": "RevisionNotFound"})
        files = [
            {"rfilename": file, "size": self.sizes.get(file, len(data)), "blobId": "0"}
            for file, data in self.repos[repo].items()
        ]
        info = {
            "id": repo,
            "sha": COMMIT,
            "siblings": files,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        self.send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def send_repo_file(self, request, repo: str, revision: str, file: str) -> None:
        if repo in self.gated:
            return self.send(request, 403, headers={"X-Error-Code": "GatedRepo"})
        if revision not in ("main", COMMIT) or file not in self.repos.get(repo, {}):
            return self.send(request, 404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        self.send_file(request, file, self.repos[repo][file])

    def send_file(self, request, name: str, data: bytes) -> None:
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        fault = self.faults.get(name) if request.command == "GET" else None
        if isinstance(fault, int):
            return self.send(request, fault)
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        sent = data[start:]
        half = None if fault is None else len(sent) // 2
        self.send(request, 206 if start else 200, sent, headers, half)
        if fault == "stall":
            self.stalled.set()
            self.release.wait(60)
            with contextlib.suppress(ConnectionError):  # the client may be gone: that is what is tested
                request.wfile.write(sent[half:])
        elif fault == "cut":
            del self.faults[name]
            request.close_connection = True

    def send(self, request, status: int, body: bytes = b"", headers=None, half: int | None = None) -> None:
        """Answer with `body`, or with the first `half` bytes of it."""
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[:half])
