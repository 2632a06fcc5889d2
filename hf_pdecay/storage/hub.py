"""Models on the Hub: fetching a plain one, and putting a compressed one there."""

from __future__ import annotations

import os
from pathlib import Path

from .folder import CONFIG


# What is of no use for compressing; pickles are never opened, so they need not come.
_NOT_FETCHED = ["*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.pt", "*.pth", "*.ckpt", "*.gguf"]


def local_folder(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a model, which is downloaded if it is a name on the Hub.

    Raises:
        ValueError: If there is neither such a folder nor such a name.
    """
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), ignore_patterns=_NOT_FETCHED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"Invalid model: {str(model)!r} is no folder here, and the Hub does not give it ({error})."
        ) from None


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str = "Upload compressed weights",
    token: str | None = None,
) -> str:
    """Upload a folder to the Hub; its repository is made if need be.

    Args:
        folder: A model's folder, such as :func:`compress` writes.
        repo_id: ``"user/name"``.
        private: Make a new repository private; by default as the account has it.
        commit_message: Of the commit.
        token: Of the account; by default the one that is logged in.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If the folder is none of a model.
    """
    if not (Path(folder) / CONFIG).is_file():
        raise ValueError(f"Invalid folder: {str(folder)!r} has no {CONFIG}; name the folder of a model.")
    from huggingface_hub import create_repo, upload_folder

    name = create_repo(repo_id, private=private, exist_ok=True, token=token).repo_id
    commit = upload_folder(repo_id=name, folder_path=str(folder), commit_message=commit_message, token=token)
    return str(commit.commit_url)
