"""Finding a model by every name a user may give it."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from npti_export.errors import ArchitectureError, GGUFError, ModelError
from npti_export.models import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_default_is_the_model_inside_the_package(default_model):
    source = resolve_model(None)
    assert source.path == default_model
    assert (source.kind, source.shape.layers, source.shape.width, source.shape.hidden) == ("gguf", 30, 1536, 576)


def test_one_fingerprint_for_all_files_of_a_model_and_another_for_another(tiny, make_tiny, tiny_checkpoint):
    fingerprint = resolve_model(str(tiny)).fingerprint
    assert resolve_model(str(tiny_checkpoint)).fingerprint == fingerprint
    assert resolve_model(str(make_tiny("Q4_1"))).fingerprint == fingerprint  # the same seed, quantised
    assert resolve_model(str(make_tiny(seed=1))).fingerprint != fingerprint


def test_broken_directories(tiny_checkpoint, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="damaged"):
        resolve_model(str(broken))
    weights.unlink()
    with pytest.raises(ModelError, match="is incomplete"):
        resolve_model(str(broken))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "rwkv"}))
    with pytest.raises(ArchitectureError, match="'rwkv' is not supported; supported are llama"):
        resolve_model(str(broken))
    for content in ("{", "[]", "{}"):
        (broken / "config.json").write_text(content)
        with pytest.raises(ModelError, match="not a usable model configuration"):
            resolve_model(str(broken))


def test_a_gguf_without_its_norms(tiny, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny.read_bytes().replace(b"output_norm.weight", b"output_morn.weight"))
    with pytest.raises(GGUFError, match=r"tensor output_norm.weight is missing"):
        resolve_model(str(path))


@pytest.fixture
def hub(tiny, tiny_checkpoint):
    """A stub of the hub's HTTP API that serves the tiny model as org/checkpoint and org/gguf."""
    files = {
        "org/checkpoint": {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir() if path.is_file()},
        "org/gguf": {"tiny.gguf": tiny.read_bytes()},
    }
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, body, status=200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            asked.append(self.path)
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[0] == "api":
                repository = "/".join(parts[2:4])
                if repository not in files:
                    return self.reply(b"{}", 404, X_Error_Code="RepoNotFound")
                if "tree" in parts:
                    listing = [
                        {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                        for name, data in files[repository].items()
                    ]
                    return self.reply(json.dumps(listing).encode(), Content_Type="application/json")
                siblings = [{"rfilename": name} for name in files[repository]]
                info = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                return self.reply(json.dumps(info).encode(), Content_Type="application/json")
            data = files.get("/".join(parts[:2]), {}).get(parts[-1])
            if data is None:
                return self.reply(b"", 404, X_Error_Code="EntryNotFound")
            return self.reply(data, ETag=f'"{parts[-1]}-{len(data)}"')

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.mark.parametrize("name", ["org/checkpoint", "org/gguf:tiny.gguf"])
def test_hub_ids(hub, tiny, tmp_path, name):
    """In a process of its own, as huggingface_hub reads its endpoint when it is imported."""
    address, asked = hub
    program = f"from npti_export.models import resolve_model; s = resolve_model({name!r}); print(s.kind, s.fingerprint)"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kind, fingerprint = done.stdout.split()
    assert kind == ("directory" if name == "org/checkpoint" else "gguf")
    assert fingerprint == resolve_model(str(tiny)).fingerprint
    assert asked


def test_a_hub_id_that_is_not_there(hub, tmp_path):
    address, _ = hub
    program = "from npti_export.cli import main; main(['--trait', 'calm', '--out', 'o.gguf', '--model', 'org/nothing'])"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "nor to be had from the hub" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
