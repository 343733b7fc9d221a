"""The documentation site builds in strict mode, is whole, and loads nothing from elsewhere."""

import html
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pulseopt_hf import __all__
from pulseopt_hf.recipes import catalogue
from tests.conftest import run_command, run_python

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")


class Loaded(HTMLParser):
    """Collects what a browser fetches for a page, its anchors and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(values["href"])
        elif "src" in values:
            self.fetched.append(values["src"])

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    own = {"cwd": ROOT, "env": {**os.environ, "NO_MKDOCS_2_WARNING": "1"}}
    run_python("-m", "mkdocs", "build", "--strict", "--site-dir", folder, **own)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Loaded]:
    pages = {}
    for file in sorted(site.glob("*.html")):
        pages[file.name] = Loaded()
        pages[file.name].feed(file.read_text())
    return pages


def test_no_page_fetches_anything_from_elsewhere(site: Path, pages: dict[str, Loaded]) -> None:
    fetched = [target for page in pages.values() for target in page.fetched]
    assert any(target.endswith(".js") for target in fetched)
    assert any(target.endswith(".css") for target in fetched)
    assert [target for target in fetched if re.match(r"(\w+:)?//", target)] == []
    styles = "".join(file.read_text() for file in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*", styles) == []


def test_every_recipe_introduces_itself_and_shows_its_file(pages: dict[str, Loaded]) -> None:
    text = "".join(pages["library.html"].text)
    words = " ".join(text.split())
    for name in [*catalogue.names(), *catalogue.profiles()]:
        lines = (catalogue.folder() / f"{name}.yaml").read_text().splitlines()
        end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        assert "\n".join(lines[end:]).strip() in text
        comment = [line.removeprefix("#").strip() for line in lines[:end]]
        for line in comment:
            assert line.replace("`", "") in words, (name, line)


def test_every_public_name_is_on_the_page_of_the_api(pages: dict[str, Loaded]) -> None:
    anchors = {name.rpartition(".")[2] for name in pages["api.html"].ids}
    assert set(__all__) <= anchors


def test_the_first_page_is_the_readme(site: Path) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "index.html").read_text()))
    blocks = re.findall(r"```\w+\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        assert block.strip() in text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the site in")
def test_search_works_where_the_site_is_opened_from_disk(site: Path, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={tmp_path}"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000"]
    page = f"{(site / 'index.html').as_uri()}?q=calibration"
    done = run_command(CHROMIUM, *flags, "--dump-dom", page, timeout=120)
    assert re.search(r"\d+ matching documents", done.stdout)
    page = (site / "method.html").as_uri()
    found = f'<a href="{page}#calibration-a-trust-region-for-one-step" class="md-search-result'
    assert found in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
