"""Uploads, against a Hub on this machine."""

import os
import re
import subprocess
import sys

import pytest
from hub_stub import TOKEN, HubStub, identity

from npti_export.errors import HubError, NptiError
from npti_export.export.hub import check_repository, push
from npti_export.version import __version__

CARD = "---\nlicense: mit\n---\n\n# A card\n"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process talks to, with a token that may write to alice and lab."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    with HubStub() as stub:
        for key, value in stub.environment().items():
            monkeypatch.setenv(key, value)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
        # these were read when huggingface_hub was imported
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # it waits between attempts
        _http.close_session()  # the client remembers proxies
        yield stub
        _http.close_session()
    enable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """An export that is a directory: a small text file, a card, a file for LFS, one in a folder."""
    path = tmp_path / "adapter"
    (path / "more").mkdir(parents=True)
    (path / "README.md").write_text(CARD)
    (path / "adapter_config.json").write_text('{"peft_type": "NPTI"}\n')
    (path / "adapter_model.safetensors").write_bytes(os.urandom(300_000))
    (path / "more" / "notes.txt").write_text("γ\n", encoding="utf-8")
    return path


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "my model.gguf"
    path.write_bytes(b"GGUF" + os.urandom(100_000))
    return path


def contents(folder):
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def test_directory(hub, folder):
    before = contents(folder)
    url = push(folder, "alice/calm", "not used")
    assert re.fullmatch(rf"{hub.endpoint}/alice/calm/commit/[0-9a-f]{{40}}", url)
    assert hub.files("alice/calm") == before == contents(folder)
    assert list(hub.objects.values()) == [before["adapter_model.safetensors"]]
    assert hub.repositories["alice/calm"].commits == [f"adapter, made with npti-export {__version__}"]
    assert not hub.repositories["alice/calm"].private


def test_directory_without_a_card(hub, folder):
    (folder / "README.md").unlink()
    push(folder, "alice/calm", CARD)
    assert hub.files("alice/calm")["README.md"] == CARD.encode()


def test_one_file_and_its_card(hub, gguf):
    push(gguf, "lab/calm", CARD)
    assert hub.files("lab/calm") == {"my model.gguf": gguf.read_bytes(), "README.md": CARD.encode()}
    assert hub.requests.count("commit") == 1


def test_repository_exists(hub, folder, gguf):
    push(folder, "alice/calm", CARD)
    (folder / "adapter_config.json").write_text("{}")
    push(folder, "alice/calm", CARD)
    push(gguf, "alice/calm", CARD)
    assert hub.files("alice/calm") == contents(folder) | {"my model.gguf": gguf.read_bytes()}
    assert hub.requests.count("put") == 2  # what the Hub has already is not sent again


def test_nothing_new_to_upload(hub, gguf):
    first = push(gguf, "alice/calm", CARD)
    assert push(gguf, "alice/calm", CARD) == first
    assert len(hub.repositories["alice/calm"].commits) == 1


def test_private(hub, gguf):
    push(gguf, "alice/calm", CARD, private=True)
    assert hub.repositories["alice/calm"].private
    push(gguf, "alice/calm", CARD, private=True)


def test_private_is_not_made_public(hub, gguf):
    push(gguf, "alice/open", CARD)
    gguf.write_bytes(b"secret")
    with pytest.raises(HubError, match=r"alice/open: exists already and is public.* --private$"):
        push(gguf, "alice/open", CARD, private=True)
    assert b"secret" not in hub.files("alice/open").values()


@pytest.mark.parametrize("repository", ["calm", "", "a/b/c", "alice/", "/calm", "alice/ca lm", "alice/x--y", "a:b/x"])
def test_invalid_repository(hub, repository):
    with pytest.raises(HubError, match="OWNER/NAME"):
        check_repository(repository)
    assert hub.requests == []


def test_check_asks_one_question(hub):
    check_repository("alice/calm")
    check_repository("lab/calm")
    check_repository("Alice/calm")
    assert hub.requests == ["whoami"] * 3
    assert hub.repositories == {}


def test_no_token(hub, gguf, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    for ask in (lambda: check_repository("alice/calm"), lambda: push(gguf, "alice/calm", CARD)):
        with pytest.raises(HubError, match=r"^alice/calm: no token .*hf auth login.*HF_TOKEN"):
            ask()
    assert hub.requests == []


def test_token_that_cannot_be_sent_is_not_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_se\x01cret")
    with pytest.raises(HubError, match="holds a character") as caught:
        check_repository("alice/calm")
    assert "cret" not in str(caught.value)


def test_wrong_token(hub, gguf, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ofNobody")
    with pytest.raises(HubError, match=r"does not know this token; .*hf auth login") as caught:
        check_repository("alice/calm")
    assert "ofNobody" not in str(caught.value)
    with pytest.raises(HubError, match=r"HTTP 401.*complete on this machine.*HF_TOKEN.*hf upload alice/calm") as caught:
        push(gguf, "alice/calm", CARD)
    assert "ofNobody" not in str(caught.value)


def test_forbidden_namespace(hub, gguf):
    with pytest.raises(HubError, match="belongs to alice, who is not a member of bob"):
        check_repository("bob/calm")
    with pytest.raises(HubError, match=r'HTTP 403: .*"bob".*use a token that may write to bob'):
        push(gguf, "bob/calm", CARD)
    assert hub.repositories == {}


def scope(name, *permissions):
    return {"entity": {"type": "user", "name": name}, "permissions": list(permissions)}


@pytest.mark.parametrize(
    ("who", "fault"),
    [
        (identity(role="read"), "may only read"),
        (identity(scoped=[]), "fine-grained token of alice may not write to alice"),
        (identity(scoped=[scope("alice", "repo.content.read")]), "may not write to alice"),
        (identity(scoped=[scope("lab", "repo.write")]), "may not write to alice"),
        (identity(scoped=[scope("alice", "repo.content.read", "repo.write")]), None),
        (identity(name="carol", orgs=(), scoped=[scope("alice/calm", "repo.write")]), None),
        ({**identity(), "auth": {}}, None),
        ({"type": "something new"}, None),
    ],
)
def test_what_a_token_may_do(hub, who, fault):
    hub.tokens[TOKEN] = who
    if fault is None:
        check_repository("alice/calm")
    else:
        with pytest.raises(HubError, match=rf"^alice/calm: .*{fault}.*HF_TOKEN"):
            check_repository("alice/calm")


def test_whoami_rate_limit_says_nothing(hub):
    hub.failures["whoami"] = 429
    check_repository("alice/calm")


@pytest.mark.parametrize(("failure", "mend"), [(500, "HTTP 500.*try again later"), ("drop", "check the network")])
def test_check_when_the_hub_is_down(hub, failure, mend):
    hub.failures["whoami"] = failure
    with pytest.raises(HubError, match=rf"^alice/calm: the Hub cannot be asked \(.*{mend}"):
        check_repository("alice/calm")


def test_offline_mode(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
        check_repository("alice/calm")


@pytest.mark.parametrize("step", ["create", "validate", "preupload", "batch", "put", "verify", "commit"])
@pytest.mark.parametrize("failure", [403, 500, "drop"])
def test_upload_breaks_off(hub, folder, step, failure):
    hub.failures[step] = failure
    before = contents(folder)
    with pytest.raises(HubError) as caught:
        push(folder, "alice/calm", CARD, private=True)
    text = str(caught.value)
    assert text.startswith("alice/calm: the upload failed (")
    assert f"but {folder} is complete on this machine" in text
    assert text.endswith(f"hf upload alice/calm {folder} --private")
    assert {403: "a token that may write", 500: "try again later", "drop": "check the network"}[failure] in text
    assert "\n" not in text
    assert TOKEN not in text
    assert isinstance(caught.value, NptiError)
    assert caught.value.exit_code == 2
    assert contents(folder) == before
    assert all(not repository.files for repository in hub.repositories.values())  # all or nothing
    hub.failures.clear()
    push(folder, "alice/calm", CARD, private=True)
    assert hub.files("alice/calm") == before


def test_passing_fault_is_survived(hub, gguf):
    """A server error that goes away, as storage has them, costs a retry and nothing else."""

    class Once(dict):
        def get(self, step):
            return self.pop(step, None)

    hub.failures = Once(put=500, batch=503, preupload="drop")
    push(gguf, "alice/calm", CARD)
    assert hub.files("alice/calm")["my model.gguf"] == gguf.read_bytes()


def test_card_that_the_hub_refuses(hub, gguf):
    with pytest.raises(HubError, match=r'HTTP 400: .*README\.md.*"license" must be a string.*correct that'):
        push(gguf, "alice/calm", "---\nlicense: 7\n---\n")
    assert hub.requests.count("put") == 0


def test_unreadable(hub, tmp_path):
    with pytest.raises(HubError, match=r"gone\.gguf: cannot be read \(No such file"):
        push(tmp_path / "gone.gguf", "alice/calm", CARD)
    assert hub.requests == []


def test_subprocess(folder):
    """The variables alone are enough, as a user sets them: nothing patched."""
    code = (
        "import sys; from pathlib import Path; from npti_export.export.hub import check_repository, push\n"
        "check_repository('lab/calm'); print(push(Path(sys.argv[1]), 'lab/calm', ''))"
    )
    with HubStub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env={**os.environ, **hub.environment()},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().startswith(f"{hub.endpoint}/lab/calm/commit/")
        assert hub.files("lab/calm") == contents(folder)
        assert TOKEN not in done.stdout + done.stderr


def test_importing_is_cheap():
    """The client of the Hub is imported only by those who upload."""
    code = "import sys, npti_export.export.hub, npti_export.export.card; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)
