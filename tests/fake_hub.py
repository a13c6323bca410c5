"""The Hub's HTTP border as huggingface_hub calls it, in this process: what is committed is kept, and answered again.

Made after the calls of huggingface_hub 2.4, without Xet. The card's header is checked by the rules that the Hub's
documentation gives; the Hub's own check is not public.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

HUB_ID = r"[\w.-]+/[\w.-]+"
LARGE = (".safetensors", ".bin", ".pt")
PIPELINES = ("text-generation", "text-classification", "feature-extraction")
LICENCES = ("apache-2.0", "mit", "llama3", "llama3.1", "gemma", "other", "cc-by-4.0", "openrail")


class FakeHub(ThreadingHTTPServer):
    """Answers on a free port of this machine.

    Attributes:
        repositories: the files of each repository, by its name and their path.
        requests: every request, as "METHOD /path".
        unknown: those that it did not know.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def header_problem(card: str) -> str | None:
    """Return what is wrong with a card's header, if anything is."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return "the card has no header"
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return f"the header is no YAML: {error}"
    if not isinstance(data, dict):
        return "the header is no mapping"
    base, tags = data.get("base_model"), data.get("tags", [])
    problems = {
        '"base_model" must be a model id': base is not None and not re.fullmatch(HUB_ID, str(base)),
        '"license" must be one of the known licences': data.get("license") not in (None, *LICENCES),
        '"license_name" is required with the license "other"': data.get("license") == "other"
        and not data.get("license_name"),
        '"pipeline_tag" is unknown': data.get("pipeline_tag") not in (None, *PIPELINES),
        '"tags" must be texts': not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags),
        '"base_model_relation" is unknown': data.get("base_model_relation") not in (None, "adapter", "merge"),
    }
    return next((problem for problem, found in problems.items() if found), None)


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self._read_body()
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, self.command.replace("HEAD", "GET")):
                answer(self, *match.groups())
                return
        self.server.unknown.append(f"{self.command} {path}")
        self._error(404, "RepoNotFound", "unknown to the fake Hub")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while length := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, content: bytes | dict[str, Any], status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str, message: str) -> None:
        self._answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    # ------------------------------------------------------------------ the Hub's calls

    def validate_card(self) -> None:
        problem = header_problem(json.loads(self.body)["content"])
        errors = [] if problem is None else [{"message": problem}]
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repository(self) -> None:
        said = json.loads(self.body)
        name = f"{said['organization']}/{said['name']}" if said.get("organization") else said["name"]
        known = name in self.server.repositories
        if not known:
            self.server.repositories[name] = {}
            self.server.private[name] = said.get("visibility") == "private"
        self._answer({"url": f"{self.server.endpoint}/{name}", "id": name}, 409 if known else 200)

    def choose_upload(self, name: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
            | {"shouldIgnore": False, "oid": None}
            for file in files
        ]
        self._answer({"files": modes})

    def lfs_batch(self, name: str) -> None:
        objects = [
            {"oid": item["oid"], "size": item["size"]}
            | {"actions": {"upload": {"href": f"{self.server.endpoint}/objects/{item['oid']}"}}}
            for item in json.loads(self.body)["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def keep_object(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self._answer(b"")

    def commit(self, name: str, revision: str) -> None:
        files = self.server.repositories[name]
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "header":
                self.server.commits.setdefault(name, []).append(value["summary"])
        commit = self._commit_of(name)
        url = f"{self.server.endpoint}/{name}/commit/{commit}"
        self._answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _commit_of(self, name: str) -> str:
        content = json.dumps(
            {path: hashlib.sha256(data).hexdigest() for path, data in self.server.repositories[name].items()}
        )
        return hashlib.sha1(content.encode()).hexdigest()

    def resolve(self, name: str, revision: str, path: str) -> None:
        if name not in self.server.repositories:
            self._error(404, "RepoNotFound", "no such repository")
        elif path not in self.server.repositories[name]:
            self._error(404, "EntryNotFound", "no such file")
        else:
            data = self.server.repositories[name][path]
            etag = hashlib.sha256(data).hexdigest()
            self._answer(data, X_Repo_Commit=self._commit_of(name), ETag=f'"{etag}"')

    def describe_repository(self, name: str, revision: str | None = None) -> None:
        if name not in self.server.repositories:
            self._error(404, "RepoNotFound", "no such repository")
            return
        files = [{"rfilename": path} for path in self.server.repositories[name]]
        self._answer({"id": name, "sha": self._commit_of(name), "siblings": files, "private": False, "tags": []})

    def list_files(self, name: str, revision: str) -> None:
        files = self.server.repositories[name].items()
        listed = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files
        ]
        self._answer(json.dumps(listed).encode())


ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("POST", rf"/api/models/({HUB_ID})/preupload/(.+)", Handler.choose_upload),
    ("POST", rf"/({HUB_ID})\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/objects/(\w+)", Handler.keep_object),
    ("POST", rf"/api/models/({HUB_ID})/commit/(.+)", Handler.commit),
    ("GET", rf"/({HUB_ID})/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET", rf"/api/models/({HUB_ID})", Handler.describe_repository),
    ("GET", rf"/api/models/({HUB_ID})/revision/(.+)", Handler.describe_repository),
    ("GET", rf"/api/models/({HUB_ID})/tree/(.+)", Handler.list_files),
]
