"""Upload to the Hugging Face hub, or to HF_ENDPOINT's server. The library handles the token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcrd_fast.errors import InputError, RunError
from qcrd_fast.utils.redact import redact

OPTION = "--push-to-hub"


def writable_repository(name: str, *, public: bool) -> str:
    """OWNER/NAME of a model repository that an upload may go to; without an owner it is the user's.

    Raises `InputError` for a name that is none, without a valid token, or where the repository exists and is public,
    but `public` is not said; `RunError` where the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, RepositoryNotFoundError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{OPTION}: {' '.join(str(error).split())}") from error
    if get_token() is None:
        raise InputError(f"{OPTION}: no token; run `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi()
    with _explained("ask"):
        if "/" not in name:
            name = f"{api.whoami()['name']}/{name}"
        try:
            is_private = api.model_info(name).private
        except RepositoryNotFoundError:
            api.whoami()  # a wrong token is not told from a missing repository
            return name
    if not is_private and not public:
        raise InputError(
            f"{OPTION}: {name} exists and is public; add --public if the model may be, or choose another name"
        )
    return name


def push(folder: Path, name: str, *, public: bool) -> str:
    """Upload a folder to the repository `name`, created if missing; return its address.

    Raises `RunError` naming the command that tries again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    private = "" if public else " --private"
    with _explained("upload to", f"; {folder} is written; to try again: hf upload {name} {folder} .{private}"):
        url = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the model")
    return str(url)


@contextmanager
def _explained(doing: str, rest: str = "") -> Iterator[None]:
    """Convert upload failures to errors of one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # of the hub, of the connection, or of the library that uploads
        status = (
            getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, HfHubHTTPError)
            else None
        )
        if status in (401, 403):
            raise InputError(
                f"{OPTION}: the hub refuses the token ({status}); it must be allowed to write{rest}"
            ) from error
        said = redact(" ".join(str(error).split()))[:300] or type(error).__name__
        raise RunError(f"{OPTION}: cannot {doing} {_endpoint()}: {said}{rest}") from error


def _endpoint() -> str:
    from huggingface_hub import constants

    return redact(constants.ENDPOINT)
