"""A server that speaks the Hub's protocol, as far as huggingface_hub and the trainer use it.

    with HubServer() as hub:
        commit = hub.commit("org/model", {"config.json": b"{}", "model.safetensors": weights})
        environ["HF_ENDPOINT"] = hub.url

Repositories are in memory. Large files (`.safetensors`, `.jsonl`) are LFS objects, which are read from another host
by a redirect with a signature, as the Hub's own are.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import yaml

from testcluster.http_server import HttpServer

Kind = Literal["models", "datasets"]
Files = dict[str, bytes]

SIGNATURE = "X-Amz-Signature=c0ffee5ec4e7"
"""In the address of an LFS object: whoever has it may read the object, so no log may."""


@dataclass
class Repository:
    """A repository: its commits, and who may read it."""

    files: dict[str, Files] = field(default_factory=dict)
    """Commit -> files."""
    branches: dict[str, str] = field(default_factory=dict)
    """Branch or tag -> commit."""
    private: bool = False
    gated: bool = False
    """Its files are only for tokens in `accepted`."""
    accepted: set[str] = field(default_factory=set)

    def find(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        return self.branches.get(revision) or (revision if revision in self.files else None)


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = json.dumps({"error": message, **body}).encode()
        self.headers = {"X-Error-Code": code} if code else {}
        if message:
            self.headers["X-Error-Message"] = message


class HubServer(HttpServer):
    """The server. Change what it holds as you like."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[Kind, str], Repository] = {}
        self.tokens: dict[str, Literal["read", "write"]] = {}
        """Token -> what it may do."""
        self.objects: dict[str, bytes] = {}
        """LFS objects by sha256."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """(method, path, headers) of every request."""
        self.cdn = ""
        """Address of the host that LFS objects are read from; empty: the same by another name."""
        self.ranges = True
        """Whether it answers a request for a part of a file with that part."""
        super().__init__("127.0.0.1", type("_Handler", (Handler,), {"hub": self}))

    @property
    def port(self) -> int:
        """On the loopback interface."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def commit(
        self, name: str, files: Files, kind: Kind = "models", branch: str = "main", **more: Any
    ) -> str:
        """Put these files, and no others, on a branch of a repository, which is made if need be; the commit."""
        repository = self.repositories.setdefault((kind, name), Repository(**more))
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        oid = hashlib.sha1(json.dumps([len(repository.files), content]).encode()).hexdigest()
        repository.files[oid] = dict(files)
        repository.branches[branch] = oid
        self.objects |= {hashlib.sha256(d).hexdigest(): d for path, d in files.items() if is_large(path)}
        return oid

    def commit_folder(self, name: str, folder: Path, kind: Kind = "models") -> str:
        """Put a folder's files on the branch `main`."""
        return self.commit(name, {path.name: path.read_bytes() for path in folder.iterdir()}, kind)


def is_large(path: str) -> bool:
    """Whether a file is an LFS object."""
    return path.endswith((".safetensors", ".jsonl"))


def git_sha1(data: bytes) -> str:
    """What git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file, as the tree API tells of it."""
    if not is_large(path):
        return {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    lfs = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(data), "oid": git_sha1(pointer), "lfs": lfs}


# --- the protocol

NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", rf"/api/(?P<kind>models|datasets)/{NAME}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"/api/(?P<kind>models|datasets)/{NAME}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("GET", rf"(/(?P<kind>datasets))?/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/(?P<kind>models|datasets)/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    ("POST", rf"/api/(?P<kind>models|datasets)/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
]


class Handler(BaseHTTPRequestHandler):
    """Answers the requests to one server."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer; the other methods are the same."""
        self._serve()

    do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, dict(self.headers)))
        for method, pattern, action in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                parts = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                self._answer(action, parts)
                return
        self._send(404, b"", {})

    def _answer(self, action: str, parts: dict[str, str]) -> None:
        try:
            getattr(self, f"_{action}")(**parts)
        except Refusal as refusal:
            self._send(refusal.status, refusal.body, refusal.headers)

    # --- who asks

    def _token(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return token

    def _may_write(self) -> None:
        if self.hub.tokens.get(self._token()) != "write":
            raise Refusal(403, "", "you need write access")

    def _repository(self, kind: str, name: str) -> Repository:
        token = self._token()
        found = self.hub.repositories.get((kind, name))  # type: ignore[call-overload]
        if found is None or (found.private and not token):
            raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        return found  # type: ignore[no-any-return]

    def _at(self, kind: str, name: str, revision: str) -> tuple[str, Files]:
        repository = self._repository(kind, name)
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.files[commit]

    # --- reading

    def _info(self, kind: str, name: str, revision: str = "main") -> None:
        commit, _ = self._at(kind, name, revision)
        self._json({"id": name, "sha": commit, "private": self._repository(kind, name).private})

    def _tree(self, kind: str, name: str, revision: str, path: str = "") -> None:
        _, files = self._at(kind, name, revision)
        here = PurePosixPath(path)
        below = {p: d for p, d in files.items() if here in PurePosixPath(p).parents or ".." in p}
        if not below:
            raise Refusal(404, "EntryNotFound", "no such folder")
        depth = len(here.parts)
        direct = [
            entry(p, d) for p, d in below.items() if len(PurePosixPath(p).parts) == depth + 1 or ".." in p
        ]
        folders = {"/".join(PurePosixPath(p).parts[: depth + 1]) for p in below} - set(below)
        self._json(direct + [{"type": "directory", "path": p, "oid": git_sha1(p.encode())} for p in folders])

    def _resolve(self, name: str, revision: str, path: str, kind: str = "models") -> None:
        commit, files = self._at(kind, name, revision)
        repository, token = self._repository(kind, name), self._token()
        if repository.gated and token not in repository.accepted:
            raise Refusal(403 if token else 401, "GatedRepo", "Access to this repository is restricted")
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        facts = entry(path, files[path])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{facts["oid"]}"'}
        if "lfs" not in facts:
            self._content(files[path], headers)
            return
        oid = facts["lfs"]["oid"]
        port = (self.headers.get("Host") or "").rpartition(":")[2]
        cdn = self.hub.cdn or f"http://localhost:{port}"
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(facts["size"])}
        self._send(302, b"", {**headers, "Location": f"{cdn}/cdn/{oid}?{SIGNATURE}"})

    def _cdn(self, oid: str) -> None:
        if SIGNATURE not in self.path or "Authorization" in self.headers:
            raise Refusal(403, "", "the signature, and nothing else, is what this wants")
        self._content(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not ranged or not self.hub.ranges:
            self._send(200, data, {**headers, "Accept-Ranges": "bytes"})
        elif (start := int(ranged[1])) >= len(data):
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        else:
            where = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], {**headers, "Content-Range": where})

    # --- writing

    def _create(self) -> None:
        self._may_write()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if ("models", name) in self.hub.repositories:
            raise Refusal(409, "", "You already created this model repo", url=f"{self.hub.url}/{name}")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json({"url": f"{self.hub.url}/{name}"})

    def _validate(self) -> None:
        errors = [{"message": message} for message in card_errors(str(json.loads(self.body)["content"]))]
        answer = {"errors": errors, "warnings": []}
        if errors:
            self._send(400, json.dumps(answer).encode(), {})
        else:
            self._json(answer)

    def _preupload(self, kind: str, name: str, revision: str) -> None:
        self._may_write()
        _, files = self._at(kind, name, revision)
        self._json({"files": [_upload_mode(file["path"], files) for file in json.loads(self.body)["files"]]})

    def _batch(self, name: str) -> None:
        self._may_write()
        objects = [dict(each) for each in json.loads(self.body)["objects"]]
        for each in objects:
            if each["oid"] not in self.hub.objects:
                base = f"http://{self.headers['Host']}"
                each["actions"] = {"upload": {"href": f"{base}/lfs/{each['oid']}?{SIGNATURE}"}}
        self._json({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def _upload(self, oid: str) -> None:
        if SIGNATURE not in self.path or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "not the object of this name")
        self.hub.objects[oid] = self.body
        self._send(200, b"", {})

    def _commit(self, kind: str, name: str, revision: str) -> None:
        self._may_write()
        _, files = self._at(kind, name, revision)
        changed = dict(files)
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                changed[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                changed[item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
        oid = self.hub.commit(name, changed, kind, revision)  # type: ignore[arg-type]
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    # --- answering

    def _json(self, value: Any, kind: str = "application/json") -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": kind})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


_IDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0
grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0
other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_IDS.split())


def card_errors(content: str) -> list[str]:
    """What the Hub finds wrong with the metadata of a card."""
    card = re.match(r"---\n(.*?)^---$", content, re.DOTALL | re.MULTILINE)
    if card is None:
        return []
    try:
        front = yaml.safe_load(card[1]) or {}
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    found = [
        f'"{key}" with value "{name}" is not valid. Use a {what} id from https://hf.co/{what}s.'
        for key, what in (("base_model", "model"), ("datasets", "dataset"))
        for name in _listed(front.get(key))
        if not _is_id(name)
    ]
    found += [
        f'"license" must be one of [{", ".join(sorted(LICENSES))}, array]'
        for name in _listed(front.get("license"))
        if name not in LICENSES
    ]
    if "license_name" in front and front.get("license") != "other":
        found.append('"license_name" is only for a "license" that is "other"')
    found += [
        f'"{key}" must be {what}'
        for key, kind, what in _KINDS
        if key in front and not isinstance(front[key], kind)
    ]
    if not all(isinstance(tag, str) for tag in _listed(front.get("tags"))):
        found.append('"tags" must be strings')
    return found


_KINDS: tuple[tuple[str, type, str], ...] = (
    ("tags", list, "an array"),
    ("datasets", list, "an array"),
    ("library_name", str, "a string"),
    ("pipeline_tag", str, "a string"),
    ("license_name", str, "a string"),
)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _is_id(name: Any) -> bool:
    """Whether the Hub takes this for the name of a repository, whether or not there is such a one."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
        and len(name) <= 96
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
    )


def _upload_mode(path: str, files: Files) -> dict[str, Any]:
    """How to upload a file, and what is there now."""
    oid = None
    if path in files:
        facts = entry(path, files[path])
        oid = facts["lfs"]["oid"] if "lfs" in facts else facts["oid"]
    mode = "lfs" if is_large(path) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}
