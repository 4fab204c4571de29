"""A small Hugging Face Hub on this machine: as much of its HTTP API as an upload needs.

with HubStub() as hub:
    hub.failures["commit"] = 500
    environment = {**os.environ, **hub.environment()}
    hub.files("alice/model")["README.md"]
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_aliceMayWrite"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
FRONT_MATTER = re.compile(r"^---\n(.*?)\n---\n", re.DOTALL)  # what the Hub takes for it


def identity(name="alice", role="write", orgs=("lab",), scoped=None):
    """What whoami says of a token; ``scoped`` are the permissions of a fine-grained one."""
    token = {"displayName": "test", "role": role}
    if scoped is not None:
        token |= {"role": "fineGrained", "fineGrained": {"global": [], "scoped": scoped}}
    return {
        "type": "user",
        "name": name,
        "orgs": [{"type": "org", "name": org, "roleInOrg": "write"} for org in orgs],
        "auth": {"type": "access_token", "accessToken": token},
    }


class Repository:
    def __init__(self, private):
        self.private = private
        self.files = {}
        self.commits = []  # the message of each


class HubStub:
    """Context manager. ``requests`` are the steps asked for, ``failures`` maps a step to a status or to "drop".

    Steps: whoami, create, info, preupload, batch, put, verify, validate, commit.
    """

    def __init__(self):
        self.tokens = {TOKEN: identity()}
        self.repositories = {}
        self.objects = {}  # LFS files by SHA-256
        self.failures = {}
        self.requests = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, token=TOKEN):
        """Variables that send a subprocess here."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",  # xet storage speaks a protocol of its own; LFS is the other way in
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repository):
        """Name -> bytes of what was committed."""
        return self.repositories[repository].files


class RefusalError(Exception):
    def __init__(self, status, message, **more):
        self.status, self.body = status, {"error": message, **more}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: two cost 40 ms, as TCP waits between them
    hub = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve(
            (r"/api/whoami-v2", "whoami"),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/main)?", "info"),
        )

    def do_POST(self):
        self._serve(
            (r"/api/repos/create", "create"),
            (r"/api/validate-yaml", "validate"),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", "preupload"),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
            (r"/lfs/([0-9a-f]{64})/verify", "verify"),
            (r"/api/models/([^/]+/[^/]+)/commit/main", "commit"),
        )

    def do_PUT(self):
        self._serve((r"/lfs/([0-9a-f]{64})", "put"))

    def _serve(self, *routes):
        body = self._read()
        path = self.path.split("?")[0]
        found = [(step, match) for pattern, step in routes if (match := re.fullmatch(pattern, path))]
        if not found:
            return self._answer(404, {"error": f"the stub has no {self.command} {path}"})
        step, match = found[0]
        self.hub.requests.append(step)
        failure = self.hub.failures.get(step)
        if failure == "drop":
            self.close_connection = True
            return None
        if failure is not None:
            return self._answer(failure, {"error": f"{step} was told to fail"})
        try:
            return self._answer(200, getattr(self, f"_{step}")(body, *match.groups()))
        except RefusalError as refusal:
            return self._answer(refusal.status, refusal.body)

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        self.wfile.write(data)

    def _who(self):
        who = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if who is None:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return who

    def _writable(self, name):
        """The repository, if the token may write to it."""
        who, owner = self._who(), name.split("/")[0]
        token = who["auth"]["accessToken"]
        places = {who["name"], *(org["name"] for org in who["orgs"])}
        if token["role"] == "fineGrained":
            scopes = token["fineGrained"]["scoped"]
            places = {scope["entity"]["name"] for scope in scopes if "repo.write" in scope["permissions"]}
        if token["role"] == "read" or not {owner, name} & places:
            raise RefusalError(403, f'You don\'t have the rights to write under the namespace "{owner}"')
        return self.hub.repositories.get(name)

    def _require(self, name):
        repository = self._writable(name)
        if repository is None:
            raise RefusalError(404, "Repository not found")
        return repository

    def _whoami(self, _body):
        return self._who()

    def _create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if self._writable(name) is not None:
            raise RefusalError(409, "You already created this model repo", url=url)
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or asked.get("private", False))
        return {"url": url, "name": name}

    def _info(self, _body, name):
        self._who()
        repository = self.hub.repositories.get(name)
        if repository is None:
            raise RefusalError(404, "Repository not found")
        siblings = [{"rfilename": file} for file in repository.files]
        head = self._oid(repository)
        return {"_id": "0", "id": name, "sha": head, "private": repository.private, "tags": [], "siblings": siblings}

    def _validate(self, body):
        match = FRONT_MATTER.match(json.loads(body)["content"])
        if match is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            data = yaml.safe_load(match[1])
        except yaml.YAMLError as error:
            raise RefusalError(400, "Invalid YAML", errors=[{"message": str(error)}], warnings=[]) from error
        if not isinstance(data, dict) or not isinstance(data.get("license", ""), str):
            raise RefusalError(400, "Invalid", errors=[{"message": '"license" must be a string'}], warnings=[])
        return {"errors": [], "warnings": []}

    def _preupload(self, body, name):
        repository = self._require(name)
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            known = repository.files.get(file["path"])
            files.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": _blob_id(known, mode)}
            )
        return {"files": files}

    def _batch(self, body, name):
        self._require(name)
        objects = []
        for one in json.loads(body)["objects"]:
            if one["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/lfs/{one['oid']}"
                one = {**one, "actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            objects.append(one)
        return {"transfer": "basic", "objects": objects}

    def _put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusalError(400, "the bytes do not have the hash that was announced")
        self.hub.objects[oid] = body
        return {}

    def _verify(self, body, oid):
        if json.loads(body) != {"oid": oid, "size": len(self.hub.objects[oid])}:
            raise RefusalError(400, "size differs")
        return {}

    def _commit(self, body, name):
        repository = self._require(name)
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile", line
                files[value["path"]] = self.hub.objects[value["oid"]]
        repository.files.update(files)
        repository.commits.append(lines[0]["value"]["summary"])
        oid = self._oid(repository)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"}

    @staticmethod
    def _oid(repository):
        return hashlib.sha1(repr(repository.commits).encode()).hexdigest()


def _blob_id(data, mode):
    """How git names a file's contents; None for a file that is not there."""
    if data is None:
        return None
    if mode == "lfs":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
