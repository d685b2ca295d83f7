"""Pictures of the report for the documentation, of the page that the demo wrote.

make demo && python benchmarks/screenshots.py [--page demo-output/report.html]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
VIEWS = {"report": (1200, 900, "light"), "report-dark-phone": (390, 800, "dark")}  # width, height, colours


def main() -> None:
    """Take each view."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("demo-output/report.html"))
    page = parser.parse_args().page.resolve()
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (width, height, scheme) in VIEWS.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
            tab = context.new_page()
            tab.goto(page.as_uri())
            tab.wait_for_timeout(1500)
            tab.screenshot(path=IMAGES / f"{name}.png")
            print(f"{name}.png: {width} x {height}, {scheme}")
        browser.close()


if __name__ == "__main__":
    main()
