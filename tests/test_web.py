"""The page of `locft try --web`: what its buttons do, through gradio's own server, and in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_comparison import FACTS, OTHERS, save_base, save_learned, save_lora

from peft_locft import AdapterComparison
from peft_locft.workflows.web import PageActions, _connect

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'peft-locft[web]'")

PROMPT, TARGET = FACTS[0].prompt, FACTS[0].target
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def facts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_learned(tmp_path_factory.mktemp("adapters") / "facts", base, FACTS, ship_edits=True)


@pytest.fixture(scope="module")
def others(base: Path, facts: Path) -> Path:
    return save_learned(facts.parent / "others", base, OTHERS, chat_template=True)


@pytest.fixture
def comparison(facts: Path, others: Path) -> AdapterComparison:
    return AdapterComparison.load([facts, others])


@pytest.fixture
def actions(comparison: AdapterComparison, tmp_path: Path) -> PageActions:
    for name in ("trained", "archives"):
        (tmp_path / name).mkdir()
    return PageActions(comparison, tmp_path / "trained", tmp_path / "archives")


# ---------------------------------------------------------------------- what the buttons do


def test_asking_shows_both_answers_and_whether_they_differ(actions: PageActions) -> None:
    base, edited = actions.ask(PROMPT, "facts", 1.0, False, 64)
    expected = actions.comparison.ask(PROMPT, ["facts"])
    assert base == str(expected.base)
    assert (edited["value"], edited["label"]) == (TARGET, "facts: changed")
    base, edited = actions.ask(PROMPT, "facts", 0.0, False, 64)
    assert (edited["value"], edited["label"]) == (base, "facts: same answer as the base")
    _, together = actions.ask(PROMPT, "all together", 1.0, False, 64)
    both = actions.comparison.ask(PROMPT, together=True, chat_template=False)
    assert together["value"] == str(both.edited["all together"])


def test_an_adapter_brings_its_scale_and_its_template(actions: PageActions) -> None:
    slider, in_chat = actions.choose("others")
    assert (slider["value"], slider["interactive"], in_chat) == (1.0, True, True)
    assert actions.choose("facts")[1] is False
    assert actions.choices == ["facts", "others", "all together"]


def test_the_slider_holds_every_adapters_scale(base: Path, facts: Path, tmp_path: Path) -> None:
    strong = Path(shutil.copytree(facts, tmp_path / "strong"))
    config = json.loads((strong / "adapter_config.json").read_text())
    (strong / "adapter_config.json").write_text(json.dumps(config | {"scale": 2.0}))
    lora = save_lora(tmp_path / "lora", base)
    actions = PageActions(AdapterComparison.load([facts, strong]), tmp_path, tmp_path)
    assert actions.scale_range == (0.0, 3.0)
    assert actions.choose("strong")[0]["value"] == 2.0
    assert actions.choose("all together")[0]["interactive"] is False, "they have no scale in common"
    plain = PageActions(AdapterComparison.load([lora]), tmp_path, tmp_path)
    assert plain.scale_range == (0.0, 1.5)
    assert plain.choose("lora")[0]["interactive"] is False
    assert plain.ask(PROMPT, "lora", 0.3, False, 4)[1]["label"] == "lora: same answer as the base"


def test_an_edit_is_trained_and_asked(actions: PageActions) -> None:
    message, choices, *_, question = actions.learn("facts", "", "Dave", "The king of Spain is")
    assert message.startswith("Learned in ")
    assert message.endswith(f"4 edits in facts. Saved to {actions.output_dir / 'facts-1'}.")
    assert (choices["value"], question) == ("facts", "The king of Spain is")
    message, choices, *_ = actions.learn("others", "The king is", "Dave", "")
    assert "in an adapter of its own. Choose 'all together' to ask both." in message
    assert choices["value"] == "added edits"
    assert choices["choices"] == ["facts", "others", "added edits", "all together"]


def test_what_cannot_be_done_is_said(actions: PageActions) -> None:
    with pytest.raises(ValueError, match="Write a question first"):
        actions.ask(" ", "facts", 1.0, False, 64)
    with pytest.raises(ValueError, match="Write a prompt and its new answer first"):
        actions.learn("facts", "", "Dave", "")
    with pytest.raises(ValueError, match="Choose the adapter that gets the edit"):
        actions.learn("all together", "The king is", "Dave", "")
    with pytest.raises(ValueError, match="Choose one adapter to download"):
        actions.download("all together", 1.0)
    with pytest.raises(ValueError, match="longer than"):
        actions.learn("facts", "The city" * 60, "Dave", "")
    assert list(actions.output_dir.iterdir()) == [], "no empty folder is left"


def test_the_archive_is_the_adapter_with_the_scale_of_the_page(
    actions: PageActions, facts: Path, tmp_path: Path
) -> None:
    (facts / "checkpoint-1").mkdir(exist_ok=True)
    (facts / "checkpoint-1" / "optimizer.pt").write_bytes(b"large")
    with zipfile.ZipFile(actions.download("facts", 1.0)["value"]) as archive:
        archive.extractall(tmp_path / "as_is")
    assert {file.name: file.read_bytes() for file in (tmp_path / "as_is" / "facts").iterdir()} == {
        file.name: file.read_bytes() for file in facts.iterdir() if file.is_file()
    }
    with zipfile.ZipFile(actions.download("facts", 0.5)["value"]) as archive:
        archive.extractall(tmp_path / "weaker")
    weaker = AdapterComparison.load([tmp_path / "weaker" / "facts"])
    assert weaker.own_scale("facts") == 0.5
    assert weaker.ask(PROMPT).edited == actions.comparison.ask(PROMPT, ["facts"], scale=0.5).edited


def test_an_error_is_a_message_and_what_nobody_expected_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def act_of(error: Exception) -> Any:
        def action() -> None:
            raise error

        # an event returns what it is to call
        return _connect(gradio, lambda act, *arguments, **options: act, action, [], [], "ask")

    with pytest.raises(gradio.Error) as shown:
        act_of(ValueError("the prompt <b>is</b> too long"))()
    assert shown.value.message == "the prompt &lt;b&gt;is&lt;/b&gt; too long"
    assert not shown.value.print_exception
    assert caplog.records == []
    with pytest.raises(gradio.Error, match="KeyError"):
        act_of(KeyError())()
    assert [record.getMessage() for record in caplog.records] == ["the page: ask failed"]


# ---------------------------------------------------------------------- served


class Server:
    """The page, served by another process."""

    def __init__(self, *adapters: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("serving_process.py")), *map(str, adapters)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        started = json.loads(self.process.stdout.readline())
        self.url, self.folder = started["url"], Path(started["folder"])

    def call(self, action: str, *values: Any) -> tuple[str, Any]:
        """Press a button, through gradio's API; return the name of the event that comes of it, and its data."""
        where = f"{self.url}gradio_api/call/{action}"
        body = json.dumps({"data": values}).encode()
        request = urllib.request.Request(where, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            event = json.load(reply)["event_id"]
        with urllib.request.urlopen(f"{where}/{event}", timeout=60) as reply:
            *_, name, data = (line.decode().partition(": ")[2] for line in reply if line.strip())
        return name.strip(), json.loads(data)

    def end(self) -> dict[str, Any]:
        """End the process; return what it prints then."""
        if self.process.poll() is None:
            output, _ = self.process.communicate(timeout=60)
            assert self.process.returncode == 0
            self.found: dict[str, Any] = json.loads(output)
        return self.found


@pytest.fixture
def server(facts: Path, others: Path) -> Iterator[Server]:
    served = Server(facts, others)
    yield served
    served.end()


def test_the_page_is_served_to_this_machine_and_calls_no_other(server: Server) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert server.folder.is_dir()
    name, (base, edited) = server.call("ask", PROMPT, "facts", 1.0, False, 64)
    assert (name, edited["value"], edited["label"]) == ("complete", TARGET, "facts: changed")
    assert base != TARGET
    # two clicks at once
    with ThreadPoolExecutor(2) as visitors:
        scales = [0.0, 1.0]
        found = list(visitors.map(lambda scale: server.call("ask", PROMPT, "facts", scale, False, 64), scales))
    assert [answers[1]["value"] for _, answers in found] == [base, TARGET]
    name, error = server.call("ask", "", "facts", 1.0, False, 64)
    assert (name, error["error"]) == ("error", "Write a question first.")
    _, (message, *_) = server.call("learn", "facts", "The king is", "Dave", "")
    assert message.startswith("Learned in ")
    assert message.endswith("Download the adapter to keep it: this page's files are deleted when it ends.")
    ended = server.end()
    assert ended["machines"] == []
    port = server.url.rpartition(":")[2].strip("/")
    assert ended["taken"] == f"The page cannot be served: port {port} is taken. Choose another with port (--port)."
    assert not server.folder.exists()


# ---------------------------------------------------------------------- in a browser


@pytest.fixture
def tab(server: Server) -> Iterator[Any]:
    """The page in a tab as wide as a phone's."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 390, "height": 844})
        opened.hosts = set()
        opened.on("request", lambda request: opened.hosts.add(request.url.split("/")[2].partition(":")[0]))
        opened.goto(server.url)
        yield opened
        browser.close()


def test_a_visitor_asks_trains_and_downloads_on_a_phone(tab: Any) -> None:
    ask = tab.get_by_role("button", name="Ask", exact=True)
    ask.click()
    tab.get_by_text("Write a question first.").wait_for()
    tab.get_by_label("Question").fill(PROMPT)
    ask.click()
    tab.get_by_label("facts: changed").wait_for()
    assert tab.get_by_label("facts: changed").input_value() == TARGET
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than the screen"
    scale = tab.get_by_label("number input for Scale")
    scale.fill("0")
    scale.blur()
    tab.get_by_label("facts: same answer as the base").wait_for()
    tab.get_by_label("Adapter").click()
    tab.get_by_role("option", name="others").click()
    tab.get_by_label("others: ").wait_for()
    tab.get_by_text("Add an edit").click()
    tab.get_by_label("Prompt").fill("The king is")
    tab.get_by_label("New answer").fill("Dave")
    tab.get_by_role("button", name="Train").click()
    tab.get_by_label("added edits: changed").wait_for()
    assert tab.get_by_label("Result").input_value().startswith("Learned in ")
    assert tab.get_by_label("added edits: changed").input_value() == "Dave"
    tab.get_by_role("button", name="Download the adapter").click()
    with tab.expect_download() as download:
        tab.locator("a[download]").first.click()
    assert download.value.suggested_filename == "added_edits.zip"
    assert tab.hosts == {"127.0.0.1"}
