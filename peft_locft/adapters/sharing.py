"""Checks an adapter and uploads it to the Hub, or packs it into an archive, with its card and without other files."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .card import CARD_NAME, NAME_IN_CARD
from .inspection import inspect_adapter
from .provenance import PROVENANCE_NAME
from .reading import MAX_CONFIG_BYTES, check_adapter, read_json
from .scope import SCOPE_NAME
from .shipped_edits import EDITS_NAME

FILES = (CARD_NAME, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PROVENANCE_NAME, EDITS_NAME, SCOPE_NAME)


def push_adapter(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
) -> str:
    """Upload a saved adapter to the Hub in one commit, with its card.

    PEFT's `model.push_to_hub` replaces the card by an empty template; this function keeps it.

    Args:
        folder: a local adapter folder, of any PEFT method. Shipped edits are uploaded; checkpoints and other files
            are not.
        repo_id: "owner/name" on the Hub. The repository is created if it does not exist.
        private: whether a new repository is private; `None`: the owner's default.
        token: access token of the Hub; `None`: that of the login.
        revision: branch to commit to; `None`: main.
        commit_message: title of the commit.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: if `inspect_adapter` refuses the folder, it has no card, or the Hub refuses the card.
        HfHubHTTPError: if the Hub refuses the upload.

    Example:
        >>> push_adapter("out", "somebody/edits")
        'https://huggingface.co/somebody/edits/commit/…'
    """
    folder = Path(folder)
    inspect_adapter(folder)
    if not (folder / CARD_NAME).is_file():
        raise ValueError(f"{folder} has no {CARD_NAME}, the model card. Call describe_adapter, or write it by hand.")
    # only now is the repository known, which the card's example loads
    named = (folder / CARD_NAME).read_text(encoding="utf-8").replace(json.dumps(NAME_IN_CARD), json.dumps(repo_id))
    try:
        ModelCard(named).validate()
    except ValueError as error:
        raise ValueError(f"{folder / CARD_NAME}: the Hub refuses its header: {error}. Correct it.") from None
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    contents = {name: folder / name for name in FILES if (folder / name).is_file()}
    operations = [CommitOperationAdd(name, path) for name, path in contents.items() if name != CARD_NAME]
    commit = api.create_commit(
        repo_id,
        [*operations, CommitOperationAdd(CARD_NAME, named.encode())],
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )
    return commit.commit_url


def zip_adapter(
    folder: str | os.PathLike[str], archive: str | os.PathLike[str], *, scale: float | None = None
) -> Path:
    """Write an adapter to a zip archive that holds one folder, and return the archive.

    Args:
        folder: a local adapter folder, of any PEFT method. Shipped edits are packed; checkpoints and other files are
            not.
        archive: the file to write; its name without `.zip` names the folder in it.
        scale: strength of the deltas in the packed adapter; `None`: as in the folder.

    Raises:
        ValueError: if `check_adapter` refuses the folder, or a `scale` is given for another method than LocFT.
    """
    folder, archive = Path(folder), Path(archive)
    method = check_adapter(folder, method=None).config.peft_type
    if scale is not None and method != "LOCFT":
        name = getattr(method, "value", method)
        raise ValueError(f"{folder}: found a {name} adapter, which has no scale of its own; leave out scale.")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in FILES:
            if name == CONFIG_NAME and scale is not None:
                config = read_json(folder, CONFIG_NAME, MAX_CONFIG_BYTES) | {"scale": float(scale)}
                packed.writestr(f"{archive.stem}/{name}", json.dumps(config, indent=2, sort_keys=True))
            elif (folder / name).is_file():
                packed.write(folder / name, f"{archive.stem}/{name}")
    return archive
