"""The page of `locft try --web`: ask, compare answers, add an edit and train it, download the adapter."""

from __future__ import annotations

import functools
import html
import itertools
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from ..adapters.sharing import zip_adapter
from ..data.edits import Edit
from .comparison import ADDED, MAX_NEW_TOKENS, TOGETHER, AdapterComparison

logger = logging.getLogger(__name__)

LARGEST_SCALE = 1.5
MESSAGE_SECONDS = 30
# a phone shows one column; what may be long wraps
STYLE = """
.gradio-container {max-width: 60rem !important; margin: 0 auto !important}
textarea {overflow-wrap: anywhere}
footer {display: none !important}
"""


def serve_comparison(
    comparison: AdapterComparison,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> ServedPage:
    """Show a comparison as a page for the browser: ask, switch adapters, set the scale, add edits, download.

    The page loads nothing from other servers, and nothing is sent to any. There is no password: everyone who reaches
    the address can ask, train and download.

    Args:
        comparison: the base and its adapters. Edits added on the page change it.
        host: address to listen at. `"127.0.0.1"`: this machine only; `"0.0.0.0"`: also others in the network.
        port: `None`: the first free one from 7860.
        output_dir: folder for the adapters that are trained on the page; `None`: a temporary one, which is deleted in
            the end.

    Returns:
        The page, which is served in the background.

    Raises:
        ImportError: if gradio is not installed.
        OSError: if the port is taken, or the folder cannot be made.

    Example:
        >>> with serve_comparison(AdapterComparison.load(["out"])) as page:
        ...     print(page.url)
        ...     page.wait()
    """
    check_gradio()
    folder = tempfile.TemporaryDirectory(prefix="locft-page-")
    try:
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        actions = PageActions(comparison, Path(output_dir or folder.name), Path(folder.name))
        app = build_page(actions)
        _, url, _ = app.launch(server_name=host, server_port=port, **_launch_settings())
    except BaseException as error:
        folder.cleanup()
        if isinstance(error, OSError) and "empty port" in str(error):
            found = "no port from 7860 on is free" if port is None else f"port {port} is taken"
            raise OSError(f"The page cannot be served: {found}. Choose another with port (--port).") from None
        raise
    return ServedPage(app, url, folder)


class ServedPage(AbstractContextManager["ServedPage"]):
    """A page that is served in the background until it is closed.

    Attributes:
        url: its address.
    """

    def __init__(self, app: Any, url: str, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.url = url
        self._app, self._folder = app, folder

    def wait(self) -> None:
        """Wait for Ctrl-C."""
        with suppress(KeyboardInterrupt):
            while not threading.Event().wait(1):  # on Windows, Ctrl-C does not end a wait without a limit
                pass

    def close(self) -> None:
        """Stop the server, and delete its temporary files."""
        self._app.close(verbose=False)
        self._folder.cleanup()

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_gradio() -> Any:
    """Return the module gradio.

    Raises:
        ImportError: if it is not installed; the message says how to install it.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"The page needs gradio, which cannot be imported ({error}): pip install 'peft-locft[web]'"
        ) from error
    return gradio


def _launch_settings() -> dict[str, Any]:
    gradio = check_gradio()
    return {
        "share": False,
        "prevent_thread_lock": True,
        "quiet": True,
        "footer_links": [],
        "enable_monitoring": False,
        "ssr_mode": False,
        "css": STYLE,
        # fonts of the system: none are loaded
        "theme": gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    }


class PageActions:
    """What the buttons of the page do; values go in, and new values of components come out.

    Args:
        comparison: the base and its adapters.
        output_dir: folder for trained adapters.
        archive_dir: folder for archives to download.
    """

    def __init__(self, comparison: AdapterComparison, output_dir: Path, archive_dir: Path) -> None:
        self.comparison = comparison
        self.output_dir, self.archive_dir = output_dir, archive_dir
        self.gradio = check_gradio()

    @property
    def choices(self) -> list[str]:
        names = self.comparison.names
        return [*names, TOGETHER] if len(names) > 1 else names

    def scale_of(self, choice: str) -> float | None:
        """Return the scale of the chosen adapters; `None` if they have none in common."""
        names = self.comparison.names if choice == TOGETHER else [choice]
        scales = {self.comparison.own_scale(name) for name in names}
        return scales.pop() if len(scales) == 1 else None

    @property
    def scale_range(self) -> tuple[float, float]:
        """From the base to more than the adapters have."""
        scales = [scale for name in self.comparison.names if (scale := self.comparison.own_scale(name)) is not None]
        return min([0.0, *scales]), max([LARGEST_SCALE, *(1.5 * scale for scale in scales)])

    def start(self) -> list[Any]:
        """Fill in the choices, which other visitors may have changed."""
        choice = self.choices[0]
        return [self.gradio.update(choices=self.choices, value=choice), *self.choose(choice)]

    def choose(self, choice: str) -> list[Any]:
        """Return the scale and the template of the chosen adapters."""
        scale = self.scale_of(choice)
        slider = self.gradio.update(value=1.0 if scale is None else scale, interactive=scale is not None)
        names = self.comparison.names if choice == TOGETHER else [choice]
        with suppress(ValueError):  # trained differently: as it was
            return [slider, self.comparison.trained_in_chat(names)]
        return [slider, self.gradio.skip()]

    def ask(self, question: str, choice: str, scale: float, chat_template: bool, max_new_tokens: float) -> list[Any]:
        """Return both answers."""
        if not question.strip():
            raise ValueError("Write a question first.")
        together = choice == TOGETHER
        answers = self.comparison.ask(
            question,
            None if together else [choice],
            together=together,
            scale=None if self.scale_of(choice) is None else scale,
            chat_template=chat_template,
            max_new_tokens=int(max_new_tokens),
        )
        mark = "changed" if answers.is_changed(choice) else "same answer as the base"
        edited = self.gradio.update(value=str(answers.edited[choice]), label=f"{choice}: {mark}")
        return [str(answers.base), edited]

    def ask_again(self, question: str, *settings: Any) -> list[Any]:
        """Return both answers; without a question, leave the page as it is."""
        return self.ask(question, *settings) if question.strip() else [self.gradio.skip()] * 2

    def learn(self, choice: str, prompt: str, target: str, question: str) -> list[Any]:
        """Train an edit; return a message, the choices with the chosen one, its settings, and the next question."""
        if choice == TOGETHER:
            raise ValueError("Choose the adapter that gets the edit.")
        prompt, target = prompt.strip() or question.strip(), target.strip()
        if not prompt or not target:
            raise ValueError("Write a prompt and its new answer first.")
        folder = self._new_folder(choice)
        try:
            learned = self.comparison.learn(choice, Edit(prompt=prompt, target=target), folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        message = f"{learned} Saved to {learned.folder}."
        if self.output_dir == self.archive_dir:
            message = f"{learned} Download the adapter to keep it: this page's files are deleted when it ends."
        if learned.name == ADDED != choice:
            message += (
                f" {choice} does not hold the edits that it was trained on, so the new edit is in an adapter of its "
                f"own. Choose '{TOGETHER}' to ask both."
            )
        choices = self.gradio.update(choices=self.choices, value=learned.name)
        return [message, choices, *self.choose(learned.name), prompt]

    def _new_folder(self, choice: str) -> Path:
        """Make a folder for a trained adapter, named like the adapter that it comes from."""
        for number in itertools.count(1):
            folder = self.output_dir / f"{_file_name(choice)}-{number}"
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
        raise AssertionError("there is always a free number")

    def download(self, choice: str, scale: float) -> Any:
        """Return the archive of the chosen adapter, with the scale of the page."""
        if choice == TOGETHER:
            raise ValueError("Choose one adapter to download.")
        own = self.scale_of(choice)
        archive = self.archive_dir / f"{_file_name(choice)}.zip"
        folder = self.comparison.folders[choice]
        zip_adapter(folder, archive, scale=None if own in (None, scale) else scale)
        return self.gradio.update(value=str(archive), visible=True)

    def hide(self) -> Any:
        """Hide an archive that holds another adapter, or another scale, than the page now shows."""
        return self.gradio.update(value=None, visible=False)


def _file_name(choice: str) -> str:
    return re.sub(r"[^\w.-]+", "_", choice).strip("._") or "adapter"


def build_page(actions: PageActions) -> Any:
    """Return the page as gradio's `Blocks`, not yet served."""
    gradio = actions.gradio
    with gradio.Blocks(title="locft try", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gradio.Markdown("## Answers before and after editing")
        # components side by side go below each other where they would be narrower than `min_width`
        with gradio.Row():
            choice = gradio.Dropdown(
                actions.choices, value=actions.choices[0], label="Adapter", filterable=False, min_width=240
            )
            scale = gradio.Slider(
                *actions.scale_range, value=1.0, step=0.05, label="Scale (0: base, 1: as trained)", min_width=240
            )
        question = gradio.Textbox(label="Question", lines=2, placeholder="The capital of Norway is")
        ask = gradio.Button("Ask", variant="primary")
        with gradio.Row():
            shown: dict[str, Any] = {"lines": 3, "max_lines": 12, "interactive": False, "min_width": 240}
            base_answer = gradio.Textbox(label=f"Base: {Path(actions.comparison.base_name).name}", **shown)
            edited_answer = gradio.Textbox(label="With the adapter", **shown)
        with gradio.Accordion("More settings", open=False):
            chat_template = gradio.Checkbox(label="Ask in chat (off: the model continues the text)")
            max_new_tokens = gradio.Slider(1, 512, value=MAX_NEW_TOKENS, step=1, label="Longest answer, in tokens")
        with gradio.Accordion("Add an edit", open=False):
            prompt = gradio.Textbox(label="Prompt", placeholder="Empty: the question above")
            target = gradio.Textbox(label="New answer", placeholder="Bergen")
            train = gradio.Button("Train")
            message = gradio.Textbox(label="Result", interactive=False, lines=2, max_lines=10)
        pack = gradio.Button("Download the adapter")
        archive = gradio.File(label="Archive", visible=False, interactive=False)

        settings = [choice, scale, chat_template, max_new_tokens]
        answers, of_choice = [base_answer, edited_answer], [scale, chat_template]
        on = functools.partial(_connect, gradio)
        on(page.load, actions.start, [], [choice, *of_choice], "start")
        on(ask.click, actions.ask, [question, *settings], answers, "ask")
        on(question.submit, actions.ask, [question, *settings], answers, "ask_by_enter")
        on(pack.click, actions.download, [choice, scale], archive, "download")
        chosen = on(choice.input, actions.choose, [choice], of_choice, "choose")
        inputs, outputs = [choice, prompt, target, question], [message, choice, *of_choice, question]
        trained = on(train.click, actions.learn, inputs, outputs, "learn", show_progress_on=message)
        for event in (scale.release, chosen.success, trained.success):
            asked = on(event, actions.ask_again, [question, *settings], answers, "ask_again")
            on(asked.success, actions.hide, [], archive, "hide")
    return page


def _connect(
    gradio: Any, event: Any, action: Callable[..., Any], inputs: Any, outputs: Any, name: str, **options: Any
) -> Any:
    """Let an event call an action: one at a time over all visitors, and an error as a message."""

    @functools.wraps(action)
    def act(*values: Any) -> Any:
        try:
            return action(*values)
        except Exception as error:
            if not isinstance(error, ValueError | OSError | FloatingPointError):
                logger.exception("the page: %s failed", name)
            text = html.escape(str(error) or type(error).__name__)
            raise gradio.Error(text, duration=MESSAGE_SECONDS, print_exception=False) from error

    return event(act, inputs, outputs, api_name=name, concurrency_limit=1, concurrency_id="model", **options)
