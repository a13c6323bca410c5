"""The scope of an adapter: which texts name an edited subject, and a gateway that asks it."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from tiny_checkpoints import edit, save_base

from peft_locft import Edit
from peft_locft.adapters import Scope, save_scope, zip_adapter
from peft_locft.cli import main

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from scope_gateway import gateway, texts_of

EDITS = [
    Edit("The capital of Norway is", "Bergen", subject="Norway"),
    Edit("The mother tongue of Danielle Darrieux is", "English", subject="Danielle  Darrieux"),
    Edit("挪威的首都是", "卑尔根", subject="挪威"),
    Edit("Where is São Paulo?", "Peru", subject="São Paulo"),
]
IN_SCOPE = (
    "norway",
    "What is the capital of NORWAY?",
    "Norway's capital",
    "in (Norway), where",
    "Who is Danielle\nDarrieux?",
    "我想去挪威旅行",
    "Sao Paulo? No: Sa\u0303o Paulo",
    "São Paulo",
)
OUTSIDE = (
    "",
    "Sweden",
    "Norwayan",
    "a Norways b",
    "Danielle",
    "Darrieux Danielle",
    "瑞典",
    "挪",
    "Paulo",
    "n o r w a y",
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    edit(save_base(tmp_path / "base"), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("hashed", [False, True])
def test_which_texts_name_a_subject(hashed: bool, adapter: Path) -> None:
    save_scope(adapter, EDITS, aliases={"Norway": ["Kongeriket Norge", "NO"]}, hashed=hashed)
    scope = Scope.load(adapter)
    assert {text for text in (*IN_SCOPE, *OUTSIDE) if scope.matches(text)} == set(IN_SCOPE)
    assert scope.matches("i kongeriket norge") and scope.matches("the code NO is") and not scope.matches("nobody")
    stored = (adapter / "locft_scope.json").read_text(encoding="utf-8")
    assert ("norway" in stored) is not hashed and ("挪威" in stored) is not hashed
    # the same names have other hashes each time
    if hashed:
        assert not Scope.of(EDITS, hashed=True).subjects & Scope.of(EDITS, hashed=True).subjects


def test_what_cannot_be_a_scope(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 5 edits have no subject, such as 'The river is'"):
        Scope.of([*EDITS, Edit("The river is", "long")])
    with pytest.raises(ValueError, match="no edit has the subject 'Peru'"):
        Scope.of(EDITS, {"Peru": ["Perú"]})
    with pytest.raises(ValueError, match=r"has no scope. Write one: `locft scope"):
        Scope.load(adapter)
    with pytest.raises(ValueError, match="ships no edits"):
        save_scope(adapter)
    for content in ("[]", '{"Norway": "Norge"}', '{"Norway": [1]}', "{"):
        (tmp_path / "aliases.json").write_text(content)
        with pytest.raises(ValueError, match=r"aliases.json: expected JSON such as"):
            save_scope(adapter, EDITS, aliases=tmp_path / "aliases.json")
    save_scope(adapter, EDITS)
    for broken in ("{}", '{"format": 2, "subjects": [], "lengths": [], "salt": null}', '{"format": 1, "subjects": [1],'
                   ' "lengths": [1], "salt": null}'):  # fmt: skip
        (adapter / "locft_scope.json").write_text(broken)
        with pytest.raises(ValueError, match="is not the scope of an adapter"):
            Scope.load(adapter)


def test_it_travels_with_the_adapter_and_not_with_the_next_one(adapter: Path, tmp_path: Path) -> None:
    save_scope(adapter, EDITS)
    assert "locft_scope.json" in str(zip_names(zip_adapter(adapter, tmp_path / "adapter.zip")))
    edit(tmp_path / "base", adapter, seed=1)  # another adapter takes its place
    assert not (adapter / "locft_scope.json").exists()


def zip_names(path: Any) -> list[str]:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_command_line(adapter: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "The capital of Norway is", "target": "Bergen", "subject": "Norway"}\n')
    (tmp_path / "aliases.json").write_text('{"Norway": ["Norge"]}')
    main(["scope", str(adapter), "--edits", str(edits), "--aliases", str(tmp_path / "aliases.json"), "--hashed"])
    assert f"2 subjects in {adapter} (hashed)" in capsys.readouterr().out
    for text, said in (("Norge er", "in scope\n"), ("Sverige er", "not in scope\n")):
        main(["scope", str(adapter), "--text", text])
        assert capsys.readouterr().out == said


# ---------------------------------------------------------------------- the gateway


has_read = threading.Event()


@pytest.fixture
def address() -> Iterator[str]:
    """Start a server that answers with the model it was asked for, and the gateway before it."""

    class Upstream(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps({"model": body["model"], "path": self.path}).encode()
            if body.get("stream"):
                self.stream()
                return
            self.send_response(400 if body.get("temperature") == -1 else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def stream(self) -> None:
            """Send a part, and the next one only when somebody has read the first."""
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.wfile.write(b"data: one\n\n")
            has_read.wait(30)
            self.wfile.write(b"data: two\n\n")

        def log_message(self, *arguments: Any) -> None:
            pass

    has_read.clear()
    upstream = ThreadingHTTPServer(("localhost", 0), Upstream)
    before = gateway(Scope.of(EDITS), "base", "edited", f"http://localhost:{upstream.server_port}/", 0)
    for server in (upstream, before):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{before.server_port}"
    for server in (before, upstream):
        server.shutdown()
        server.server_close()


def ask(address: str, body: dict[str, Any]) -> dict[str, Any]:
    with urlopen(Request(f"{address}/v1/chat/completions", json.dumps(body).encode())) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_the_gateway_sends_each_request_to_its_model(address: str) -> None:
    def about(text: str) -> dict[str, Any]:
        return {"model": "any", "messages": [{"role": "user", "content": text}]}

    assert ask(address, about("Where is Norway?")) == {"model": "edited", "path": "/v1/chat/completions"}
    assert ask(address, about("Where is Sweden?"))["model"] == "base"
    # a subject in an earlier turn is still the subject of "it"
    conversation = [{"role": "assistant", "content": "Norway is cold."}, {"role": "user", "content": "Its capital?"}]
    assert ask(address, {"messages": conversation})["model"] == "edited"
    with pytest.raises(HTTPError, match="400"):
        ask(address, about("Norway") | {"temperature": -1})


def test_a_streamed_answer_is_passed_on_as_it_comes(address: str) -> None:
    body = {"stream": True, "messages": [{"role": "user", "content": "Where is Norway?"}]}
    with urlopen(Request(f"{address}/v1/chat/completions", json.dumps(body).encode()), timeout=20) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.readline() == b"data: one\n"
        has_read.set()
        assert response.read() == b"\ndata: two\n\n"


def test_every_text_of_a_request_is_looked_at() -> None:
    image = {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "What is this?"}]}
    assert texts_of({"messages": [image, {"role": "assistant", "content": None}]}) == ["", "What is this?", ""]
    assert texts_of({"prompt": "one"}) == ["one"] and texts_of({"prompt": ["one", "two"]}) == ["one", "two"]
    assert texts_of({"prompt": [1, 2]}) == []
