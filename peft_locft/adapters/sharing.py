"""Uploads an adapter to the Hub: checked, with its card, and without other files of its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .card import CARD_NAME, NAME_IN_CARD
from .inspection import inspect_adapter
from .provenance import PROVENANCE_NAME
from .shipped_edits import EDITS_NAME

FILES = (CARD_NAME, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PROVENANCE_NAME, EDITS_NAME)


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

    PEFT's own `model.push_to_hub` uploads the weights too, but replaces the card by transformers' empty one.

    Args:
        folder: a local adapter folder, of any PEFT method. Edits that it ships are uploaded; checkpoints and other
            files are not.
        repo_id: "owner/name" on the Hub. The repository is created if it does not exist.
        private: whether a new repository is private; `None` is the owner's default.
        token: of the Hub; `None` is that of the login.
        revision: branch to commit to; `None` is main.
        commit_message: the title of the commit.
        create_pr: open a pull request with the commit.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: if the folder is refused by `inspect_adapter`, has no card, or has one that the Hub refuses.
        HfHubHTTPError: if the Hub refuses the upload.

    Example:
        >>> push_adapter("out", "somebody/edits")
        'https://huggingface.co/somebody/edits/commit/…'
    """
    folder = Path(folder)
    inspect_adapter(folder)
    if not (folder / CARD_NAME).is_file():
        raise ValueError(f"{folder} has no {CARD_NAME}, the model card. Write it with describe_adapter, or by hand.")
    # the card names the repository to load the adapter from, which is known only now
    named = (folder / CARD_NAME).read_text(encoding="utf-8").replace(json.dumps(NAME_IN_CARD), json.dumps(repo_id))
    try:
        ModelCard(named).validate()
    except ValueError as error:
        raise ValueError(f"{folder / CARD_NAME}: the Hub refuses its header: {error}") from None
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
