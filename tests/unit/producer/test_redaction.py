"""What may be shown of a stranger's words: one short line, and of an address nothing that is secret."""

import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.servers import untimed
from zlora.redaction import label, shown, without_secrets

SECRETS = ("us3r", "pa55", "t0ken", "fr4g")
SECRET_URL = "https://us3r:pa55@example.com/x.safetensors?sig=t0ken#fr4g"
characters = string.ascii_letters + string.digits


def document(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a portrait", **fields}


# --- an address


@untimed
@given(
    scheme=st.sampled_from(["https", "http", "HTTPS", "ftp", "cozy://https"]),
    userinfo=st.text(
        st.characters(exclude_characters="/?#", exclude_categories=["Cs"]), max_size=30
    ),
    query=st.text(max_size=30),
    fragment=st.text(max_size=30),
    path=st.text(characters + "/-_.", max_size=20),
)
@example(scheme="https", userinfo="a@b:c@d", query="", fragment="", path="x")
@example(scheme="https", userinfo="a\\b:c", query="", fragment="", path="x")
def test_of_an_address_only_scheme_host_and_path_are_shown(
    scheme: str, userinfo: str, query: str, fragment: str, path: str
) -> None:
    address = f"{scheme}://{userinfo}@example.com:8443/{path}?{query}#{fragment}"

    assert without_secrets(address) == f"{scheme}://example.com:8443/{path}"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("cozy://loras/anime-v1", "cozy://loras/anime-v1"),
        ("cozy://loras/anime@2", "cozy://loras/anime@2"),
        ("cozy://loras/anime?sig=t0ken", "cozy://loras/anime"),
        ("loras/anime-v1", "loras/anime-v1"),
        ("https://example.com?sig=t0ken", "https://example.com"),
        ("https://example.com/@scope/x", "https://example.com/@scope/x"),
        ("https://[::1]:8443/@scope/x", "https://[::1]:8443/@scope/x"),
        ("https://us3r:pa/55@example.com/x", "https://example.com/x"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("file:///models/a@b?c", "file:///models/a@b"),
        ("//us3r:pa55@example.com/x", "example.com/x"),
        ("https:us3r:pa55@example.com/x", "example.com/x"),
        ("https:/us3r:pa55@example.com/x", "example.com/x"),
        ("https:\\\\us3r:pa55@example.com/x", "example.com/x"),
    ],
)
def test_an_address_of_another_spelling_is_shown_as_far_as_it_is_safe(
    address: str, shown: str
) -> None:
    assert without_secrets(address) == shown


@pytest.mark.parametrize(
    "address",
    [
        "COZY://https://us3r:pa55@example.com/x",
        "https:///us3r:pa55@example.com/x",
        "https://https://us3r:pa55@example.com/x",
    ],
)
def test_a_misspelt_address_shows_no_credentials_either(address: str) -> None:
    assert "pa55" not in without_secrets(address)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (None, None),
        ("my.style", "my.style"),
        ("a? or #2", "a? or #2"),
        (SECRET_URL, "https://example.com/x.safetensors"),
    ],
)
def test_a_label_is_as_it_is_unless_it_is_an_address(name: str | None, told: str | None) -> None:
    assert label(name) == told


# --- a request in one line


def test_a_request_is_shown_with_its_prompt_and_its_loras() -> None:
    data = document(
        seed=3,
        loras=[{"file": {"url": SECRET_URL}}, {"file": {"cozy_ref": "owner/anime"}, "weight": 0.5}],
    )

    line = shown(data)

    for part in (
        "prompt='a portrait'",
        "seed=3",
        "'https://example.com/x.safetensors'",
        "'owner/anime'",
    ):
        assert part in line
    assert not [secret for secret in SECRETS if secret in line]


def test_a_lora_is_shown_by_the_name_that_it_is_given_else_by_its_address_and_its_weight() -> None:
    specs = [
        {"file": {"url": SECRET_URL}, "adapter_name": "my style", "weight": 0.8},
        {"file": {"url": SECRET_URL, "sha256": "0" * 64}, "weight": -1},
        {"file": {"ref": "hf://owner/name/x"}, "adapter_name": None},
    ]

    assert shown({"loras": specs}) == (
        "lora='my style' 0.8, lora='https://example.com/x.safetensors' -1, lora='hf://owner/name/x'"
    )


def test_of_a_long_address_the_host_and_the_file_are_shown() -> None:
    line = shown(
        {
            "loras": [
                {"file": {"url": f"https://example.com/{'x' * 500}/anime.safetensors?sig=t0ken"}}
            ]
        }
    )

    assert line.startswith("lora='https://example.com/...")
    assert line.endswith("xxx/anime.safetensors'")
    assert len(line) < 100


def test_eight_loras_with_the_longest_names_are_all_shown() -> None:
    specs = [
        {"file": {"url": SECRET_URL}, "adapter_name": str(place) * 200, "weight": 0.12345}
        for place in range(8)
    ]

    assert shown(document(loras=specs)).count("lora=") == 8


HASHED = "sha256:afd4124d75f4"  # sha256sum of "a portrait", as far as it is shown


def test_a_prompt_may_be_shown_by_its_hash_alone() -> None:
    """So may any text that could be one; what a request says beside them stays."""
    data = document(
        negative_prompt="fog",
        promt="a portrait",
        scheduler="euler",
        seed=3,
        loras=[{"file": {"ref": "x"}}],
    )

    line = shown(data, prompts="hashed")

    assert line.startswith(f"prompt={HASHED}, negative_prompt=sha256:")
    assert f"promt={HASHED}, scheduler='euler', seed=3, lora='x'" in line
    assert not [
        text for text in ("portrait", "fog") if text in line + shown("a portrait", prompts="hashed")
    ]


def test_a_prompt_is_shown_as_it_is() -> None:
    """It is no address: what follows a question mark is not its query."""
    assert "a cat? or #2 dogs" in shown(document(prompt="a cat? or #2 dogs"))


@pytest.mark.parametrize(
    "data",
    [
        None, 7, "text", [], [document()], {}, {"loras": 1}, {"loras": [1, {}, {"file": 1}, {"file": {}}]},
        {"loras": {"file": {}}}, {"prompt": ["x" * 5000]}, {"prompt": "a\nb"}, {"a\nb": 1}, {"x" * 5000: 1},
        {1: {2: 3}}, {"loras": [{"file": {"url": 7}}] * 1000},
    ],
    ids=lambda data: repr(data)[:30],
)  # fmt: skip
def test_what_a_stranger_sent_is_shown_in_one_short_line_too(data: Any) -> None:
    line = shown(data)

    assert len(line) <= 1000
    assert line.isprintable()


@untimed
@given(
    st.recursive(
        st.none() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_is_shown_without_an_error(data: Any) -> None:
    assert len(shown(data)) <= 1000


@pytest.mark.parametrize(
    "data",
    [
        {"url": SECRET_URL}, {"loras": [{"file": {"url": SECRET_URL, "odd": SECRET_URL}}]}, SECRET_URL, [SECRET_URL],
        {"loras": [SECRET_URL]}, {"loras": SECRET_URL}, {"loras": [{"file": SECRET_URL}]},
        {"request": {"x": SECRET_URL}}, {"loras": [{"adapter_name": SECRET_URL}]},
        {"loras": [{"adapter_name": "//us3r:pa55@host/x", "file": {"url": SECRET_URL}, "weight": SECRET_URL}]},
    ],
    ids=lambda data: repr(data)[:30],
)  # fmt: skip
def test_an_address_in_the_wrong_place_shows_no_secret(data: Any) -> None:
    assert not [secret for secret in SECRETS if secret in shown(data)]


def test_an_address_in_a_thousand_others_ends_nothing() -> None:
    """A stranger's: it must cost its job an error, and not the worker its stack."""
    assert without_secrets("a://" * 1000 + "u:pa55@h") == "***"
    assert "pa55" not in shown(
        {"prompt": "x", "loras": [{"file": {"url": "a://" * 1000 + "u:pa55@h"}}]}
    )
