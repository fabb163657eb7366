"""The documentation agrees with the code, and its links lead somewhere."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import reference
from zlora import config
from zlora.cli import main as zlora
from zlora.server import settings as server_settings
from zlora_worker import settings as worker_settings

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


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_and_json_in_a_page_are_valid(page: Path) -> None:
    for source in blocks(page, "python"):
        compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for text in blocks(page, "json"):
        try:
            json.loads(text)
        except ValueError:  # a document on each line
            [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_in_a_page_exist(page: Path) -> None:
    """`zlora` in shell blocks, also as the service `producer` of the compose file."""
    context = click.Context(zlora)
    for line in "\n".join(blocks(page, "sh")).splitlines():
        if not (found := re.search(r"(?:^|[|] )(?:\w+=\S+ )*zlora (.+)| producer (.+)", line)):
            continue
        name, *words = (found[1] or found[2]).partition("#")[0].split()
        command = zlora.get_command(context, name)
        if isinstance(command, click.Group):
            command = command.get_command(context, words[0])
        assert command is not None, line
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if re.match("--?[a-z]", word)} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_variables_and_make_targets_in_a_page_exist(page: Path) -> None:
    text = page.read_text()
    rows = (*worker_settings.reference(), *server_settings.reference())
    variables = {name for row in rows for name in row.names} | {"ZLORA_SECRETS"}
    variables |= set(re.findall(r"\$\{(ZLORA_\w+):-", (ROOT / "docker-compose.yml").read_text()))
    variables |= {name for name in vars(config).values() if str(name).startswith("ZLORA_")}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    benchmarks = [path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py")]
    targets += [f"bench-{name}" for name in benchmarks]

    named = {
        name.removesuffix("_FILE") for name in re.findall(r"\bZLORA_[A-Z0-9_]*[A-Z0-9]\b", text)
    }

    assert named <= variables
    assert set(re.findall(r"(?:`|^)make ([\w-]+)(?=[` \n])", text, re.MULTILINE)) <= {*targets}


def test_every_image_in_the_docs_is_used() -> None:
    used = {target.resolve() for page in PAGES for target, _ in links(page)}

    assert set((ROOT / "docs" / "pictures").iterdir()) <= used


def test_every_page_in_the_docs_is_linked_from_the_readme() -> None:
    linked = {target.resolve() for target, _ in links(ROOT / "README.md")}

    assert set((ROOT / "docs").rglob("*.md")) <= linked
