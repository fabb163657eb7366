"""The documentation agrees with the code, and its links lead somewhere."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import reference

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "README.md",
    ROOT / "deploy" / "kubernetes" / "README.md",
]
PACKAGES = (
    ROOT / "producer",
    ROOT / "producer" / "zlora",
    ROOT / "worker" / "zlora_worker",
)
FOLDERS = ("deploy", "docs", "examples", "producer", "tests", "tools", "worker")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield the target and the anchor of each link to another place of this repository."""
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", without_code(page)):
        yield (page.parent / target if target else page), anchor


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", reference.pages())
def test_a_reference_page_is_what_make_docs_writes(name: str) -> None:
    assert (reference.FOLDER / name).read_text() == reference.pages()[name], "run `make docs`"


def test_the_reference_has_every_page_and_no_other() -> None:
    assert {path.name for path in reference.FOLDER.iterdir()} == set(reference.pages())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    broken = [
        f"{target}#{anchor}"
        for target, anchor in links(page)
        if not target.exists() or (anchor and anchor not in anchors(target))
    ]

    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_a_page_exist(page: Path) -> None:
    """Files of this repository, and modules from the folder of either package."""
    if page.name == "CHANGELOG.md":  # names what is gone, too
        return
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+|[\w/]+\.py)`(?!\])", page.read_text())
    missing = [
        path
        for path in paths
        if not path.startswith("deploy/secrets/")  # made by deploy/secrets.sh
        and not any((folder / path).exists() for folder in (ROOT, page.parent, *PACKAGES))
    ]

    assert not missing


def test_every_image_in_the_docs_is_used() -> None:
    used = {target.resolve() for page in PAGES for target, _ in links(page)}

    assert set((ROOT / "docs" / "pictures").iterdir()) <= used


def test_every_page_in_the_docs_is_linked_from_the_readme() -> None:
    linked = {target.resolve() for target, _ in links(ROOT / "README.md")}

    assert set((ROOT / "docs").rglob("*.md")) <= linked
