"""The files of the page: what they are served with, and that they need nothing from elsewhere."""

import re
from html.parser import HTMLParser
from importlib import resources
from typing import Final

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from zlora.server import page

FOLDER: Final = resources.files("zlora.server").joinpath("page_files")
TEXTS: Final = {file.name: file.read_text() for file in FOLDER.iterdir()}
SCRIPTS: Final = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


class Parsed(HTMLParser):
    """Tags and attributes of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=page.routes()))


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_is_asked_for_each_time_and_sent_once(client: TestClient, name: str) -> None:
    path = "/" if name == "index.html" else f"/page/{name}"
    first = client.get(path)
    again = client.get(path, headers={"If-None-Match": first.headers["ETag"]})

    assert (first.status_code, first.text) == (200, TEXTS[name])
    assert first.headers["Cache-Control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
    for answer in (first, again):
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy


def test_there_is_nothing_beside_the_files(client: TestClient) -> None:
    for path in ("/page/", "/page/index.html", "/page/../page.py", "/page/%2e%2e/page.py"):
        assert client.get(path).status_code == 404


def test_the_page_has_no_script_or_style_of_its_own_and_no_address_elsewhere() -> None:
    found = Parsed(TEXTS["index.html"])
    addresses = [value for name, value in found.attributes if name in ("src", "href")]
    files = [value for value in addresses if not value.startswith("#")]

    assert "style" not in found.tags
    assert found.tags.count("script") == 1
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    assert {value.removeprefix("page/") for value in files} <= {*TEXTS, "openapi.json"}
    assert "url(" not in TEXTS["style.css"]
    assert "@import" not in TEXTS["style.css"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_module_parses_no_markup_and_imports_its_neighbours_only(name: str) -> None:
    text = SCRIPTS[name]
    parsing = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|"
    running = r"\beval\b|new Function|setAttribute\(\"(?:style|on)"

    assert re.findall(parsing + running + "|//[a-z]+[.]", text) == []
    imported = re.findall(r"from \"\./([\w.]+)\"", text)
    assert set(imported) <= set(SCRIPTS)
    assert len(re.findall(r"^import ", text, re.MULTILINE)) == len(imported)
