"""What README says of the code is what the code says."""

import re
from pathlib import Path

from zlora import errors

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_table_of_failures_is_the_error_classes() -> None:
    listed = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.+) \| (yes|no) \|$", README, re.MULTILINE)
    abstract = {"ZloraError", "LoraError"}
    classes = [cls for cls in errors.ERRORS if cls.__name__ not in abstract]

    assert {(code, name, retry) for code, name, _, retry in listed} == {
        (cls.code, cls.__name__, "yes" if cls.retryable else "no") for cls in classes
    }


def test_every_test_that_readme_names_is_there() -> None:
    tests = Path(__file__).parents[1]
    functions = {
        name
        for path in tests.rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }

    for function in re.findall(r"`(test_\w+)`", README):
        assert function in functions
    for path in re.findall(r"`(tests/\S+\.py)`", README):
        assert (tests.parent / path).is_file()


def test_every_page_and_file_that_the_docs_link_is_there() -> None:
    root = Path(__file__).parents[2]
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("examples/*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    ]

    assert len(links) > 20
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_no_page_has_a_place_that_is_still_to_be_filled() -> None:
    root = Path(__file__).parents[2]
    for page in [*root.glob("*.md"), *root.glob("docs/*.md")]:
        assert not re.search(r"^[A-Z]{6,}$", page.read_text(), re.MULTILINE), page.name
