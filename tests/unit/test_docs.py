"""What README says of the code is what the code says."""

import re
from pathlib import Path

from zlora import errors

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_table_of_failures_is_the_error_classes() -> None:
    listed = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.+) \| (yes|no) \|$", README, re.MULTILINE)
    abstract = {"ZloraError", "LoraError"}
    classes = [getattr(errors, name) for name in errors.__all__ if name not in abstract]

    assert {(code, name, retry) for code, name, _, retry in listed} == {
        (cls.code, cls.__name__, "yes" if cls.retryable else "no") for cls in classes
    }


def test_every_test_that_readme_names_is_there() -> None:
    tests = Path(__file__).parents[1]
    functions = {name for path in tests.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}

    for function in re.findall(r"`(test_\w+)`", README):
        assert function in functions
    for path in re.findall(r"`(tests/\S+\.py)`", README):
        assert (tests.parent / path).is_file()
