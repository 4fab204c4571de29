"""Upload a finished export to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.errors import HubError
from npti_export.gguf.shards import named_shards
from npti_export.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_CARD = "README.md"
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN to a token with write access"


def check_repository(repository: str) -> None:
    """Raise before any work is done if an upload to ``repository`` is sure to fail; asks the Hub one question.

    Passes where the Hub's answer leaves it open whether the token may write: only :func:`push` can then tell.

    Raises:
        HubError: not of the form ``owner/name``, no token, a token that the Hub does not know or that may not
            write there, or the Hub cannot be reached.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise _bad_id(repository) from error
    if "/" not in repository:
        raise _bad_id(repository)
    api = _api(repository)
    try:
        identity = api.whoami()
    except Exception as error:  # see push
        status = _status(error)
        if status == 429:  # whoami is strictly rate limited, which says nothing about the token
            return
        if status == 401:
            raise HubError(f"{repository}: the Hub does not know this token; {_LOG_IN}") from error
        mend = _mend(error, repository)
        raise HubError(f"{repository}: the Hub cannot be asked ({_reason(error)}); {mend}, or do not upload") from error
    fault = _fault(identity, repository)
    if fault is not None:
        raise HubError(f"{repository}: {fault}; {_LOG_IN}, or choose another owner")


def push(path: Path, repository: str, card: str, *, private: bool = False) -> str:
    """Upload a directory whole, or one file with ``card`` as its README.md, and return the URL of the commit.

    The repository is created if it is missing. Files that it has already are replaced if the names are the same,
    and kept otherwise.

    Args:
        path: a directory, or a file that is uploaded under its own name; the first of a split model stands for all.
        repository: ``owner/name``.
        card: the model card; not used for a directory that has a README.md.
        private: create the repository as private. Otherwise it is what the owner's settings say, mostly public.

    Raises:
        HubError: ``path`` is missing or unreadable, ``private`` was asked for but the repository is public already,
            or the upload failed; then the local files are as they were.
    """
    try:
        additions = _additions(path, card)
    except OSError as error:
        raise HubError(f"{error.filename}: cannot be read ({error.strerror}); nothing was uploaded") from error
    api = _api(repository)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        # creating a repository that exists leaves it as it is, and a private model must not become public
        exposed = private and not api.repo_info(repository).private
        if not exposed:
            message = f"{path.resolve().name}, made with npti-export {__version__}"
            return api.create_commit(repository, additions, commit_message=message).commit_url
    except Exception as error:  # the client lets errors of its HTTP library, of hf_xet and of threads through
        raise HubError(
            f"{repository}: the upload failed ({_reason(error)}), but {path} is complete on this machine; "
            f"{_mend(error, repository)}, and upload it with: {_retry(path, repository, private=private)}"
        ) from error
    raise HubError(
        f"{repository}: exists already and is public, so nothing was uploaded, and {path} is complete on this machine; "
        f"make the repository private in its settings, and upload with: {_retry(path, repository, private=private)}"
    )


def _bad_id(repository: str) -> HubError:
    return HubError(
        f"{repository!r}: not a repository on the Hub; give OWNER/NAME, at most 96 letters, digits, '-', '_' and '.'"
    )


def _api(repository: str) -> HfApi:
    from huggingface_hub import HfApi, get_token

    try:
        token = get_token()
    except Exception as error:  # it may ask a server for the token
        raise HubError(f"{repository}: no token for the Hub could be had ({_reason(error)}); {_LOG_IN}") from error
    if token is None:
        raise HubError(f"{repository}: no token for the Hub is configured; {_LOG_IN}")
    if not token.isascii() or not token.isprintable() or " " in token:
        # the HTTP library would quote it in its error
        raise HubError(f"{repository}: the token for the Hub holds a character that no token has; {_LOG_IN}")
    # huggingface_hub reads HF_ENDPOINT only once, when it is imported
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    return HfApi(endpoint=endpoint, token=token, library_name="npti-export", library_version=__version__)


def _additions(path: Path, card: str) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    if path.is_dir():
        files = {one.relative_to(path).as_posix(): one for one in sorted(path.rglob("*")) if one.is_file()}
    else:
        files = {one.name: one for one in named_shards(path)}
        for one in files.values():
            one.stat()  # CommitOperationAdd has an error of its own for a missing file
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=one) for name, one in files.items()]
    if _CARD not in files:
        additions.append(CommitOperationAdd(path_in_repo=_CARD, path_or_fileobj=card.encode()))
    return additions


def _fault(identity: Any, repository: str) -> str | None:
    """See :func:`_refusal`; an answer of another form, as a mirror may give, leaves it open."""
    try:
        return _refusal(identity, repository)
    except (AttributeError, TypeError):
        return None


def _refusal(identity: dict[str, Any], repository: str) -> str | None:
    """Why the token is sure not to write to the repository, or None. ``identity`` is the answer of whoami."""
    if identity.get("type") != "user":
        return None
    user, owner = str(identity.get("name"))[:100], repository.split("/")[0]
    token = (identity.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return f"the token of {user} may only read"
    if token.get("role") == "fineGrained":
        # it may be for one repository of an organisation that it does not show
        places = _writable(token.get("fineGrained") or {})
        if places is None or {owner.lower(), repository.lower()} & places:
            return None
        return f"the fine-grained token of {user} may not write to {owner}"
    names = [user, *(org.get("name") for org in identity.get("orgs") or [])]
    if owner.lower() in {str(name).lower() for name in names}:
        return None
    return f"the token belongs to {user}, who is not a member of {owner}"


def _writable(grants: dict[str, Any]) -> set[str] | None:
    """Owners and repositories that a fine-grained token may write to, in lower case; None if it does not say."""
    scopes = grants.get("scoped")
    if scopes is None or "repo.write" in (grants.get("global") or []):
        return None
    return {
        str((scope.get("entity") or {}).get("name")).lower()
        for scope in scopes
        if "repo.write" in (scope.get("permissions") or [])
    }


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, which may be wrapped in others; None if there was no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return int(cause.response.status_code)
        cause = cause.__cause__
    return None


def _reason(error: BaseException) -> str:
    """The error in one short line."""
    from huggingface_hub.errors import HfHubHTTPError

    status = _status(error)
    text = (error.server_message or "") if isinstance(error, HfHubHTTPError) else str(error) or type(error).__name__
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split()).rstrip(".")
    text = text if len(text) <= 200 else text[:200] + "…"
    return ": ".join(([f"HTTP {status}"] if status else []) + ([text] if text else []))


def _mend(error: BaseException, repository: str) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE"
    if status in (401, 403, 404):  # the Hub hides what a token may not see
        return f"use a token that may write to {repository.split('/')[0]} (`hf auth login` or HF_TOKEN)"
    if status == 400:
        return "correct that"
    if status is None:
        return "check the network and try again"
    return "try again later"


def _retry(path: Path, repository: str, *, private: bool) -> str:
    flag = ["--private"] if private else []
    return shlex.join(["hf", "upload", repository, str(path), *flag])
