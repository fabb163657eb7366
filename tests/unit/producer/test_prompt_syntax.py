"""What a prompt of each syntax means: weights, breaks, LoRAs; and what is refused by name."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.servers import untimed
from zlora.prompt_syntax import (
    MAX_WEIGHT,
    Fragment,
    LoraTag,
    ParsedPrompt,
    escaped,
    parse,
    without_loras,
)


def fragments(text: str) -> list[tuple[str, float]]:
    """Return the fragments of a prompt without `BREAK`, with rounded weights."""
    (section,) = parse(text, "a1111").sections
    return [(fragment.text, round(fragment.weight, 6)) for fragment in section]


@pytest.mark.parametrize(
    "text", ["", "a (cat:1.3)", "[a:b:0.5]", "a BREAK b AND c", "<lora:x:1>", "a\\(b\\)"]
)
def test_a_plain_prompt_is_its_text(text: str) -> None:
    assert parse(text, "plain") == ParsedPrompt(((Fragment(text),),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("a ((very)) good [dull] b", [
            ("a ", 1.0), ("very", 1.21), (" good ", 1.0), ("dull", 0.909091), (" b", 1.0),
        ]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:-.5)", [("a", -0.5)]),
        ("(a:0)", [("a", 0.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[unbalanced", [("unbalanced", 0.909091)]),
        ("closed) twice]", [("closed) twice]", 1.0)]),
        ("16:9) wide", [("16:9) wide", 1.0)]),
        ("at 10:30", [("at 10:30", 1.0)]),
        ("smile (:-)", [("smile ", 1.0), (":-", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 0.909091)]),
        (r"\(literal\] \[b\)", [("(literal] [b)", 1.0)]),
        (r"a \\ b \AND c \BREAK d\\"[:-1], [(r"a \ b AND c BREAK d", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("BRANDY and sAND", [("BRANDY and sAND", 1.0)]),
        ("a|b, [c, (d|e)]", [("a|b, ", 1.0), ("c, ", 0.909091), ("d|e", 1.0)]),
        ("[a|b", [("a|b", 0.909091)]),
        ("[a:b]", [("a:b", 0.909091)]),
        ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", [
            ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
            (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
        ]),
    ],
)  # fmt: skip
def test_weights_are_those_of_the_web_ui(text: str, expected: list[tuple[str, float]]) -> None:
    assert fragments(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a BREAK b", [[("a ", 1.0)], [(" b", 1.0)]]),
        ("a BREAK BREAK b", [[("a ", 1.0)], [(" ", 1.0)], [(" b", 1.0)]]),
        ("BREAK a", [[("", 1.0)], [(" a", 1.0)]]),
        ("a BREAK ", [[("a ", 1.0)]]),
        ("(a BREAK b:1.5)", [[("a ", 1.5)], [(" b", 1.5)]]),
    ],
)
def test_break_begins_a_section(text: str, expected: list[list[tuple[str, float]]]) -> None:
    assert [list(map(tuple, section)) for section in parse(text, "a1111").sections] == expected


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:anime>", LoraTag("anime")),
        ("<lora:anime:0.8>", LoraTag("anime", 0.8, 0.8)),
        ("<lora: anime v2 : 0.8 : -.5>", LoraTag("anime v2", 0.8, -0.5)),
        ("<lora:anime:te=0.8:unet=0.5>", LoraTag("anime", 0.8, 0.5)),
        ("<lora:anime:unet=0.5>", LoraTag("anime", None, 0.5)),
        ("<lora:anime:6.1e-05>", LoraTag("anime", 6.1e-05, 6.1e-05)),
        ("<lyco:anime:1>", LoraTag("anime", 1.0, 1.0)),
    ],
)
def test_a_tag_names_a_lora_and_is_no_text(tag: str, expected: LoraTag) -> None:
    """Of two numbers the first is that of the text encoders, as in the web UI."""
    prompt = f"a (cat{tag}:1.2) hat"

    assert parse(prompt, "a1111") == ParsedPrompt(
        ((Fragment("a "), Fragment("cat", 1.2), Fragment(" hat")),), (expected,)
    )
    assert without_loras(prompt) == "a (cat:1.2) hat"


@pytest.mark.parametrize(
    "text", ["a (b:1.2) [c:0.5] [d|e]", r"\(a\) \\", "a AND b BREAK", "<lora:x:1>", "1 < 2, :)"]
)
def test_an_escaped_text_is_read_as_that_text(text: str) -> None:
    assert parse(escaped(text), "a1111") == ParsedPrompt(((Fragment(text),),))


def test_an_escaped_tag_is_text() -> None:
    assert parse(r"\<lora:x:1>", "a1111") == ParsedPrompt(((Fragment("<lora:x:1>"),),))
    assert without_loras(r"\<lora:x:1> \(") == r"\<lora:x:1> \("


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a [b:c:0.5] d", "prompt editing, .* \\(character 3\\)"),
        ("a [b:0.5]", "prompt editing"),
        ("a [b::12]", "prompt editing"),
        ("[(a:1.2)::.5]", "prompt editing"),
        ("a [b|c]", "alternation"),
        ("[(a)|b]", "alternation"),
        ("a AND b", "`AND`"),
        ("<hypernet:x:1>", "networks"),
        ("<lora:>", "a LoRA tag has a name"),
        ("<lora:x:1:1:16>", "at most two weights"),
        ("<lora:x:dyn=1>", "at most two weights"),
        ("<lora:x:1:te=1>", "at most two weights"),
        ("<lora:x:high>", "a weight is a number"),
        ("<lora:x:5>", "from -4 to 4"),
        ("(a:1.2.3)", "a weight is a number"),
        ("(a:11)", "weights from -10 to 10"),
        ("(" * 101 + "a", "at most 100 brackets"),
        ("((a:" + "9" * 300 + "):" + "9" * 300 + ")", "weights from -10 to 10"),
        ("(((a:" + "9" * 300 + "):" + "9" * 300 + "):0)", "weights from -10 to 10"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_and_without_the_text(
    text: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse(text, "a1111")

    assert text not in str(caught.value)


PIECES = [*"()[]|:<>\\ ,.-+0123", ":1.2)", ":0.5]", "BREAK", "AND", "<lora:x:1>", "cat", "é", "\n"]


@settings(untimed, max_examples=150)
@given(text=st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60))
@example(text="a:" * 5000)
@example(text="<a:" * 3333)
@example(text="[a](b)" * 1600)
def test_every_text_is_read_or_refused(text: str) -> None:
    """What is read has only characters of the text, in their order, and weights in bounds."""
    try:
        parsed = parse(text, "a1111")
    except ValueError as error:
        assert str(error).startswith("Expected")  # noqa: PT017 - either outcome is right
        return

    characters = iter(text)
    for section in parsed.sections:
        assert section
        for fragment in section:
            assert abs(fragment.weight) <= MAX_WEIGHT
            assert all(character in characters for character in fragment.text)
