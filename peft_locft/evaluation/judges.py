"""Who judges: an OpenAI-compatible address, or a model on this machine; and the replies that are known already."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from ..data.edits import Prompt
from ..data.encoding import encode_prompts
from ..engine.decoding import check_fits, generate_and_score
from ..engine.loading import load_config, load_model
from ..engine.questions import UNTIL_EOS, Question
from ..io.untrusted_json import shortened

logger = logging.getLogger(__name__)

MINIMUM = {"max_new_tokens": 1, "concurrency": 1, "timeout_seconds": 1, "max_retries": 0, "retry_seconds": 0}
RETRIED = {408, 425, 429, *range(500, 600)}  # status codes of a server that may answer later
LONGEST_WAIT_SECONDS = 120.0
ANSWERS_AT_A_TIME = 32  # of a local model, before they are written to the cache


@dataclass
class JudgeConfig:
    """A language model that judges answers. Nothing is sent anywhere without one.

    Args:
        judge (`str`):
            The base address of a server with OpenAI's interface, such as `"http://localhost:8000/v1"`, or a folder or
            name of a model that runs here.
        model (`str`, *optional*): the model's name at that address.
        api_key_variable (`str`, defaults to `"LOCFT_JUDGE_API_KEY"`):
            Environment variable that holds the API key. It is a variable of our own, so that no key is sent to an
            address that it is not meant for. Without it, no key is sent.
        request (`dict`, *optional*):
            Fields of the request that replace ours, such as `{"max_tokens": None, "max_completion_tokens": 2000}`;
            `None` leaves a field out.
        max_new_tokens (`int`, defaults to 256): longest reply. A judge that thinks before it replies needs more.
        concurrency (`int`, defaults to 8): requests at the same time.
        timeout_seconds (`float`, defaults to 60): longest time that a request may take.
        max_retries (`int`, defaults to 6): further tries of a request that failed for a reason that may pass.
        retry_seconds (`float`, defaults to 1): time before the first of them; doubled each time.
        cache (`str`, *optional*):
            File of the replies so far, to which new ones are added: what is in it is not asked again.

    Raises:
        ValueError: if a field has none of the values named here.

    Example:
        >>> args = JudgeConfig("http://localhost:8000/v1", model="qwen3-32b")
    """

    judge: str
    model: str | None = None
    api_key_variable: str = "LOCFT_JUDGE_API_KEY"
    request: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 256
    concurrency: int = 8
    timeout_seconds: float = 60.0
    max_retries: int = 6
    retry_seconds: float = 1.0
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, minimum in MINIMUM.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"JudgeConfig.{name}={getattr(self, name)}: expected {minimum} or more.")
        if self.is_address and not self.model:
            raise ValueError(
                f"JudgeConfig: found the address {shown_address(self.judge)} and no model. Pass the name that the "
                "model has there as `model` (--judge_model)."
            )
        if not self.is_address and self.model:
            raise ValueError(
                f"JudgeConfig: found model={self.model!r} beside {self.judge!r}, which is no address (http:// or "
                "https://). Leave `model` (--judge_model) out, or give the address."
            )
        if self.is_address:
            shown_address(self.judge)

    @property
    def is_address(self) -> bool:
        """Whether the judge is at an address, and not a model that runs here."""
        return re.match(r"https?://", self.judge, re.IGNORECASE) is not None

    @property
    def label(self) -> str:
        """The judge in words, such as "gpt at https://…/chat/completions"."""
        return f"{self.model} at {shown_address(completions_address(self.judge))}" if self.is_address else self.judge


def completions_address(base: str) -> str:
    """Return the address that answers, from the base address of a server or from that address itself."""
    parts = urlsplit(base)
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return urlunsplit(parts._replace(path=path))


def shown_address(address: str) -> str:
    """Return an address without what may be secret in it.

    Raises:
        ValueError: if it holds a user or a password, or no server.
    """
    parts = urlsplit(address)
    if not parts.hostname or "@" in parts.netloc:
        raise ValueError(
            "JudgeConfig.judge: found an address without a server, or with a user in it; expected one such as "
            "http://localhost:8000/v1. Put a key into the environment variable of `api_key_variable`."
        )
    return urlunsplit(parts._replace(query="", fragment=""))


class Judge(Protocol):
    """Replies to texts, in any order, each with its place."""

    def replies(self, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield the place of a text and the reply to it, until every text has one."""


def judge_of(args: JudgeConfig) -> Judge:
    """Return the judge that a configuration names.

    Raises:
        ImportError: if it is at an address, and httpx is not installed.
        ValueError: if its model cannot be used.
        OSError: if its model cannot be loaded.
    """
    return AddressJudge(args) if args.is_address else ModelJudge(args)


# ---------------------------------------------------------------------- at an address


def check_judge(args: JudgeConfig) -> None:
    """Check what a judge needs, before a long evaluation.

    Raises:
        ImportError: if it is at an address, and httpx is not installed.
        ValueError: if it is neither an address, nor the folder of a model, nor a name on the Hub.
        OSError: if the model's configuration cannot be loaded.
    """
    if args.is_address:
        _httpx()
    else:
        load_config(args.judge)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise ImportError("A judge at an address needs httpx: pip install 'peft-locft[judge]'") from error
    return httpx


class AddressJudge:
    """A model behind the path `/chat/completions` of a server.

    Args:
        args: the address, and how to ask.

    Raises:
        ImportError: if httpx is not installed.
    """

    def __init__(self, args: JudgeConfig) -> None:
        httpx = _httpx()
        self.args = args
        self._failed = httpx.TransportError
        self._stopped = threading.Event()
        key = os.environ.get(args.api_key_variable, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # no redirects: another server would get key and answers
        self._client = httpx.Client(headers=headers, timeout=args.timeout_seconds, follow_redirects=False)
        self._address = completions_address(args.judge)

    def replies(self, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
        pool = ThreadPoolExecutor(self.args.concurrency, thread_name_prefix="judge")
        try:
            places: dict[Future[str], int] = {pool.submit(self._reply, text): n for n, text in enumerate(texts)}
            left = dict(places)
            for future in as_completed(places):
                if future.exception() is not None:
                    break
                yield left.pop(future), future.result()
            self._stopped.set()
            # one has failed: those that are under way end, and what they reply is not lost
            under_way = [future for future in left if not future.cancel()]
            wait(under_way)
            yield from ((left[each], each.result()) for each in under_way if each.exception() is None)
            for future in under_way:
                future.result()  # raises
        finally:
            self._stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._client.close()

    def _reply(self, text: str) -> str:
        """Ask once, and again while the server is busy."""
        body: dict[str, Any] = {
            "model": self.args.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.args.max_new_tokens,
        } | self.args.request
        body = {name: value for name, value in body.items() if value is not None}
        why = ""
        for number in range(self.args.max_retries + 1):
            pause = min(self.args.retry_seconds * 2**number, LONGEST_WAIT_SECONDS)
            try:
                response = self._client.post(self._address, json=body)
            except self._failed as error:
                why = f"{type(error).__name__}: {error}"
            else:
                if response.status_code not in RETRIED:
                    return self._content(response)
                why = f"status {response.status_code}"
                pause = max(pause, _seconds(response.headers.get("Retry-After")))
            if number < self.args.max_retries and self._stopped.wait(pause):
                break
        raise ConnectionError(
            f"{self.args.label}: no reply after {self.args.max_retries + 1} tries; the last: {why}. Check the "
            "address, or lower `concurrency`. Run again to continue: the replies so far are in the cache, if there is "
            "one."
        )

    def _content(self, response: Any) -> str:
        """Return the text of a reply; "" for one that has none, which is then an unreadable verdict."""
        if response.status_code != 200:
            hint = (
                f" Set the environment variable {self.args.api_key_variable} to the API key."
                if response.status_code in (401, 403)
                else ""
            )
            raise ValueError(
                f"{self.args.label}: found status {response.status_code}; expected 200: "
                f"{shortened(response.text)}.{hint}"
            )
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return ""
        return content if isinstance(content, str) else ""


def _seconds(header: str | None) -> float:
    """Return the time that a server asks for; 0 if it gives none, or a date."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", header or "")
    return min(float(found[1]), LONGEST_WAIT_SECONDS) if found else 0.0


# ---------------------------------------------------------------------- on this machine


class ModelJudge:
    """A model that runs here: a folder, or a name on the Hub. It is asked in its chat template, if it has one.

    Args:
        args: the model, and how long its replies may be.
    """

    def __init__(self, args: JudgeConfig) -> None:
        self.args = args
        self._model, self._tokenizer = load_model(args.judge)

    def replies(self, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
        in_chat = bool(getattr(self._tokenizer, "chat_template", None))
        prompts = [Prompt(text, ()) if in_chat else Prompt(f"{text}\n\nVerdict:") for text in texts]
        encoded = encode_prompts(prompts, self._tokenizer)
        questions = [
            Question(tuple(ids), num_stops=UNTIL_EOS, max_new_tokens=self.args.max_new_tokens) for ids in encoded
        ]
        check_fits(self._model, questions, self._tokenizer)
        for begin in range(0, len(questions), ANSWERS_AT_A_TIME):
            some = questions[begin : begin + ANSWERS_AT_A_TIME]
            answers = generate_and_score(self._model, self._tokenizer, some, label="the judge", progress=False)
            for number, answer in enumerate(answers, start=begin):
                yield number, str(self._tokenizer.decode(answer.token_ids, skip_special_tokens=True))


# ---------------------------------------------------------------------- what is known already


class ReplyCache:
    """The replies of judges in a file, by a hash of the judge and of the whole text that it was given.

    Args:
        path: the file; `None`: in memory.
        args: the judge.
    """

    def __init__(self, path: str | os.PathLike[str] | None, args: JudgeConfig) -> None:
        self.path = None if path is None else Path(path)
        asked = {"judge": args.judge, "model": args.model, "request": args.request, "tokens": args.max_new_tokens}
        self._judge = json.dumps(asked, sort_keys=True)
        content = b"" if self.path is None or not self.path.is_file() else self.path.read_bytes()
        self._known: dict[str, str] = dict(self._read(content))
        # a run that was stopped may have left half a line
        self._begin = "" if content[-1:] in (b"", b"\n") else "\n"

    @staticmethod
    def _read(content: bytes) -> Iterator[tuple[str, str]]:
        for line in content.decode("utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                yield str(row["sha256"]), str(row["reply"])
            except (ValueError, KeyError, TypeError):
                continue  # half a line

    def key(self, text: str) -> str:
        """Return the hash of a text and of the judge."""
        return hashlib.sha256(f"{self._judge}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()

    def __contains__(self, text: str) -> bool:
        return self.key(text) in self._known

    def __getitem__(self, text: str) -> str:
        return self._known[self.key(text)]

    def add(self, replies: Mapping[str, str]) -> None:
        """Add replies by text."""
        rows = {self.key(text): reply for text, reply in replies.items()}
        self._known |= rows
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"sha256": key, "reply": reply}) + "\n" for key, reply in rows.items())
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._begin + "".join(lines))
            self._begin = ""
