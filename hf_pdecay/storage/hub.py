"""Downloads models from the Hub, and uploads compressed ones."""

from __future__ import annotations

import os
from pathlib import Path

from .folder import CONFIG


# Files that are not needed; pickles are never opened.
_NOT_FETCHED = ["*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.pt", "*.pth", "*.ckpt", "*.gguf"]


def local_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return a model's folder, downloaded if ``model`` is a name on the Hub; raise ValueError if neither exists."""
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), revision=revision, ignore_patterns=_NOT_FETCHED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"Invalid model: {str(model)!r} is not a folder here, and cannot be downloaded from the Hub ({error})."
        ) from None


def stored_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path | None:
    """Return a model's folder without a network: that of its name, or the snapshot of the Hub that is here, if any."""
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str = "Upload compressed weights",
    token: str | None = None,
) -> str:
    """Upload a folder to the Hub; the repository is created if it does not exist.

    Args:
        folder: A model's folder, such as :func:`compress` writes.
        repo_id: ``"user/name"``.
        private: Whether a new repository is private; by default the account's setting.
        commit_message: The message of the commit.
        token: The token of the account; by default that of the login.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: If the folder is not a model's.
    """
    if not (Path(folder) / CONFIG).is_file():
        raise ValueError(f"Invalid folder: {str(folder)!r} has no {CONFIG}; name the folder of a model.")
    from huggingface_hub import create_repo, upload_folder

    name = create_repo(repo_id, private=private, exist_ok=True, token=token).repo_id
    commit = upload_folder(repo_id=name, folder_path=str(folder), commit_message=commit_message, token=token)
    return str(commit.commit_url)
