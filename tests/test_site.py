"""The documentation site: it builds without a warning, asks for nothing from elsewhere, and can be searched."""

import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx", reason="pip install 'torchquant[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", ROOT / "docs", folder]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def opened(browser):
    """A page of some width, what it complained of, and what it asked for elsewhere."""
    pages = []

    def make(width, url):
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        faults = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: None if "127.0.0.1" in asked.url else faults.append(asked.url))
        page.goto(url)
        return page, faults

    yield make
    for page in pages:
        page.close()


def test_every_page_of_the_folder_is_in_the_site(site):
    pages = [page.relative_to(ROOT / "docs").with_suffix(".html") for page in ROOT.glob("docs/**/*.md")]
    assert [str(page) for page in pages if not (site / page).is_file()] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_open_without_complaint_on_a_phone_and_a_desk(site, address, opened, width):
    for page in sorted(site.glob("**/*.html")):
        if "_modules" in page.parts:
            continue
        shown, faults = opened(width, f"{address}/{page.relative_to(site)}")
        assert faults == [], page
        assert shown.evaluate("document.documentElement.scrollWidth") <= width, page


def test_the_search_finds_an_algorithm(address, opened):
    page, faults = opened(1280, f"{address}/search.html?q=AdaRound")
    page.wait_for_selector("#search-results li a")
    links = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")
    assert any("api/algorithms.html" in link for link in links)
    assert faults == []
