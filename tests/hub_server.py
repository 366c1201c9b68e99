"""A local server that speaks the parts of the Hugging Face hub's HTTP API that uploads and downloads use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

OID = "c" * 40


class Hub:
    """State of the server.

    repositories: name → {"private": bool, "branches": {branch: {path: bytes}}}. writers: tokens that may write. fail: pairs of
    a pattern of "METHOD /path" and the statuses that the next matching requests get. requests: all "METHOD /path".
    part_size: if set, large files are sent by HTTP in parts of so many bytes. xet_store: the folder to which the Xet client
    writes large files; the server knows only their sizes and hashes, as the hub does.
    """

    def __init__(self):
        self.repositories: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.writers = {"hf_writer"}
        self.fail: list[tuple[str, list[int]]] = []
        self.requests: list[str] = []
        self.url = ""
        self.part_size: int | None = None
        self.xet_store: Path | None = None

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        branches = self.repositories[name]["branches"]
        return branches.get(branch, branches["main"])  # a commit is the newest of main


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Silent."""

    def reply(self, value, status: int = 200, headers: dict | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, statuses in self.hub.fail:
            if statuses and re.fullmatch(pattern, f"{self.command} {path}"):
                return self.reply({"error": f"no {self.headers.get('Authorization')}"}, statuses.pop(0))
        if path.startswith("/objects/"):  # as signed addresses of a store: no token
            return self.store(*path.split("/")[2:], body=body)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        reads = self.command in ("GET", "HEAD")
        if not reads and token not in self.hub.writers:
            return self.reply({"error": f"bad token {token}"}, 401 if not token.startswith("hf_") else 403)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        for pattern, method in (
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            (r"/api/models/([^/]+/[^/]+)/tree/(.+)", self.tree),
            (r"/api/models/([^/]+/[^/]+)/xet-write-token/(.+)", self.xet_token),
            (r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", self.info),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch()", self.batch),
            (r"/([^/]+/[^/]+)/resolve/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                if match[1] not in self.hub.repositories:
                    return self.reply({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})
                return method(match[1], match[2] or "main", body)
        return self.reply({"error": "unknown address"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def create(self, given: dict) -> None:
        name = f"{given['organization']}/{given['name']}"
        existed = name in self.hub.repositories
        private = given.get("private", given.get("visibility") == "private")
        self.hub.repositories.setdefault(name, {"private": private, "branches": {"main": {}}})
        self.reply({"url": f"{self.hub.url}/{name}"}, 409 if existed else 200)

    def branch(self, name: str, branch: str, body: bytes) -> None:
        branches = self.hub.repositories[name]["branches"]
        existed = branch in branches
        branches.setdefault(branch, dict(branches["main"]))
        self.reply({"error": "exists"} if existed else {}, 409 if existed else 200)

    def info(self, name: str, branch: str, body: bytes) -> None:
        files = self.hub.files(name, branch)
        siblings = [{"rfilename": path} for path in files]
        self.reply({"id": name, "sha": OID, "siblings": siblings, "private": self.hub.repositories[name]["private"]})

    def tree(self, name: str, branch: str, body: bytes) -> None:
        files = self.hub.files(name, branch)
        self.reply([{"type": "file", "path": path, "size": len(files[path]), "oid": OID} for path in files])

    def preupload(self, name: str, branch: str, body: bytes) -> None:
        files = json.loads(body)["files"]
        mode = {True: "lfs", False: "regular"}
        self.reply(
            {
                "files": [
                    {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for f in files
                ]
            }
        )

    def batch(self, name: str, branch: str, body: bytes) -> None:
        objects, size = [], self.hub.part_size
        for one in json.loads(body)["objects"]:
            address = f"{self.hub.url}/objects/{one['oid']}"
            upload = {"href": address}
            if size is not None:
                parts = {str(n): f"{address}/{n}" for n in range(1, -(-one["size"] // size) + 1)}
                upload["header"] = {"chunk_size": str(size), **parts}
            objects.append(one | ({} if one["oid"] in self.hub.objects else {"actions": {"upload": upload}}))
        self.reply({"transfer": "basic" if size is None else "multipart", "objects": objects})

    def store(self, oid: str, part: str = "", *, body: bytes) -> None:
        if self.command == "PUT":
            self.hub.objects[f"{oid}/{part}" if part else oid] = body
        else:
            parts = sorted(json.loads(body)["parts"], key=lambda one: one["partNumber"])
            self.hub.objects[oid] = b"".join(self.hub.objects[f"{oid}/{one['etag']}"] for one in parts)
        self.reply({}, 200, {"ETag": part})

    def xet_token(self, name: str, branch: str, body: bytes) -> None:
        reply = {
            "casUrl": f"local://{self.hub.xet_store}",
            "accessToken": "short-lived",
            "exp": int(time.time()) + 3600,
        }
        names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
        self.reply(reply, 200, dict(zip(names, map(str, reply.values()), strict=True)))

    def commit(self, name: str, branch: str, body: bytes) -> None:
        files = self.hub.files(name, branch)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and self.hub.xet_store is not None:
                files[value["path"]] = f"{value['oid']} {value['size']}".encode()
            elif line["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.reply({"success": True, "commitOid": OID, "commitUrl": f"{self.hub.url}/{name}/commit/{OID}"})

    def resolve(self, name: str, rest: str, body: bytes) -> None:
        revision, _, path = rest.partition("/")
        content = self.hub.files(name, revision).get(path)
        if content is None:
            return self.reply({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": OID})
        digest = hashlib.sha256(content).hexdigest()
        return self.reply(content, 200, {"ETag": f'"{digest}"', "X-Repo-Commit": OID})


@contextmanager
def serve_hub():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
