"""Take the picture of the page in docs/pages/trying.md: `python docs/take_screenshot.py ADAPTER`.

ADAPTER is the one that examples/quickstart.py makes. Needs the extra `web`, the package playwright, and Chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from peft_locft import AdapterComparison, serve_comparison

PICTURE = Path(__file__).parent / "pages" / "images" / "try_page.png"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def main(adapter: str) -> None:
    """Write the picture."""
    with serve_comparison(AdapterComparison.load([adapter])) as page, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 800, "height": 600})
        tab.goto(page.url)
        tab.get_by_text("More settings").click()
        tab.get_by_label("Ask in chat").check()
        tab.get_by_label("Question").fill("What is the capital of Norway?")
        tab.get_by_role("button", name="Ask", exact=True).click()
        tab.get_by_label("quickstart: changed").wait_for()
        tab.wait_for_timeout(500)  # until the marks of progress are gone
        tab.screenshot(path=PICTURE, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
