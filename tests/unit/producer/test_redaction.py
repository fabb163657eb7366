"""What logs, receipts and Flower show of addresses, requests and free text: no secrets."""

import json
import string
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.servers import untimed
from zlora.redaction import ENUM_FIELDS, Redactor, label, shown, without_secrets
from zlora.schema import enum_fields

SECRETS = ("us3r", "pa55", "t0ken", "fr4g")
SECRET_URL = "https://us3r:pa55@example.com/x.safetensors?sig=t0ken#fr4g"
characters = string.ascii_letters + string.digits


def document(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a portrait", **fields}


# --- addresses


@settings(untimed, max_examples=50)
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
def test_an_address_keeps_scheme_host_and_path_only(
    scheme: str, userinfo: str, query: str, fragment: str, path: str
) -> None:
    address = f"{scheme}://{userinfo}@example.com:8443/{path}?{query}#{fragment}"

    assert without_secrets(address) == f"{scheme}://example.com:8443/{path}"


@pytest.mark.parametrize(
    ("address", "safe"),
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
def test_an_address_of_another_form_loses_its_secrets(address: str, safe: str) -> None:
    assert without_secrets(address) == safe


@pytest.mark.parametrize(
    "address",
    [
        "COZY://https://us3r:pa55@example.com/x",
        "https:///us3r:pa55@example.com/x",
        "https://https://us3r:pa55@example.com/x",
    ],
)
def test_a_misspelt_address_loses_its_credentials(address: str) -> None:
    assert "pa55" not in without_secrets(address)


def test_an_address_with_a_thousand_nested_addresses_is_masked() -> None:
    """Looking into each could exhaust the stack and end the worker."""
    nested = "a://" * 1000 + "u:pa55@h"

    assert without_secrets(nested) == "***"
    assert "pa55" not in shown({"prompt": "x", "loras": [{"file": {"url": nested}}]})


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        (None, None),
        ("my.style", "my.style"),
        ("a? or #2", "a? or #2"),
        (SECRET_URL, "https://example.com/x.safetensors"),
    ],
)
def test_a_label_changes_only_if_it_is_an_address(name: str | None, safe: str | None) -> None:
    assert label(name) == safe


# --- a request in one line


def test_a_request_is_shown_with_its_prompt_and_its_loras() -> None:
    data = document(
        seed=3,
        loras=[{"file": {"url": SECRET_URL}}, {"file": {"cozy_ref": "owner/anime"}, "weight": 0.5}],
    )

    line = shown(data)

    url = "'https://example.com/x.safetensors'"
    for part in ("prompt='a portrait'", "seed=3", url, "'owner/anime'"):
        assert part in line
    assert not [secret for secret in SECRETS if secret in line]


def test_a_lora_is_shown_by_its_name_else_by_its_address() -> None:
    specs = [
        {"file": {"url": SECRET_URL}, "adapter_name": "my style", "weight": 0.8},
        {"file": {"url": SECRET_URL, "sha256": "0" * 64}, "weight": -1},
        {"file": {"ref": "hf://owner/name/x"}, "adapter_name": None},
    ]

    assert shown({"loras": specs}) == (
        "lora='my style' 0.8, lora='https://example.com/x.safetensors' -1, lora='hf://owner/name/x'"
    )


def test_an_embedding_is_shown_by_its_address() -> None:
    specs = [{"file": {"url": SECRET_URL}, "token": "<s0>"}, {"file": {"cozy_ref": "owner/anime"}}]

    assert shown({"embeddings": specs}) == (
        "embedding='https://example.com/x.safetensors', embedding='owner/anime'"
    )


def test_an_image_is_shown_by_its_address() -> None:
    data = {"image": {"url": SECRET_URL}, "mask": {"url": "job:portrait-1#3"}, "strength": 0.5}

    assert shown(data) == (
        "image='https://example.com/x.safetensors', mask='job:portrait-1#3', strength=0.5"
    )
    assert shown({"image": SECRET_URL}) == "image='https://example.com/x.safetensors'"


def test_a_long_address_keeps_its_host_and_file_name() -> None:
    url = f"https://example.com/{'x' * 500}/anime.safetensors?sig=t0ken"

    line = shown({"loras": [{"file": {"url": url}}]})

    assert line.startswith("lora='https://example.com/...")
    assert line.endswith("xxx/anime.safetensors'")
    assert len(line) < 100


def test_eight_loras_with_the_longest_names_are_all_shown() -> None:
    specs = [
        {"file": {"url": SECRET_URL}, "adapter_name": str(place) * 200, "weight": 0.12345}
        for place in range(8)
    ]

    assert shown(document(loras=specs)).count("lora=") == 8


def test_a_prompt_can_be_shown_as_its_hash() -> None:
    """The same holds for any text that may be a prompt; other fields stay."""
    digest = "sha256:afd4124d75f4"  # printf "a portrait" | sha256sum
    data = document(
        negative_prompt="fog",
        promt="a portrait",
        scheduler="DPM++ 2M Karras",
        seed=3,
        loras=[{"file": {"ref": "x"}}],
    )

    line = shown(data, prompts="hashed")

    assert line.startswith(f"prompt={digest}, negative_prompt=sha256:")
    assert f"promt={digest}, scheduler='DPM++ 2M Karras', seed=3, lora='x'" in line
    line += shown(document(scheduler="a portrait"), prompts="hashed")
    line += shown("a portrait", prompts="hashed")
    assert not [text for text in ("portrait", "fog") if text in line]


def test_a_question_mark_in_a_prompt_is_not_a_query() -> None:
    assert "a cat? or #2 dogs" in shown(document(prompt="a cat? or #2 dogs"))


@pytest.mark.parametrize(
    "data",
    [
        None,
        7,
        "text",
        [],
        [document()],
        {},
        {"loras": 1},
        {"loras": [1, {}, {"file": 1}, {"file": {}}]},
        {"loras": {"file": {}}},
        {"prompt": ["x" * 5000]},
        {"prompt": "a\nb"},
        {"a\nb": 1},
        {"x" * 5000: 1},
        {1: {2: 3}},
        {"loras": [{"file": {"url": 7}}] * 1000},
    ],
    ids=range(15),
)
def test_an_invalid_request_is_shown_in_one_short_line(data: Any) -> None:
    line = shown(data)

    assert len(line) <= 1000
    assert line.isprintable()


@settings(untimed, max_examples=30)
@given(
    st.recursive(
        st.none() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_is_shown_without_an_error(data: Any) -> None:
    assert len(shown(data)) <= 1000


@pytest.mark.parametrize(
    "data",
    [
        {"url": SECRET_URL},
        {"loras": [{"file": {"url": SECRET_URL, "odd": SECRET_URL}}]},
        SECRET_URL,
        [SECRET_URL],
        {"loras": [SECRET_URL]},
        {"loras": SECRET_URL},
        {"loras": [{"file": SECRET_URL}]},
        {"request": {"x": SECRET_URL}},
        {"loras": [{"adapter_name": SECRET_URL}]},
        {"loras": {SECRET_URL: 1}},
        {SECRET_URL: 1},
        {"request": {SECRET_URL: 1}},
        {
            "loras": [
                {
                    "adapter_name": "//us3r:pa55@host/x",
                    "file": {"url": SECRET_URL},
                    "weight": SECRET_URL,
                }
            ]
        },
    ],
    ids=range(13),
)
def test_an_address_in_a_wrong_place_loses_its_secrets(data: Any) -> None:
    assert not [secret for secret in SECRETS if secret in shown(data)]


# --- free text

SECRET = "s3cret-t0ken"
QUERY = "X-Amz-Signature=0a1b2c"


@pytest.mark.parametrize(
    "text",
    [
        f"the token {SECRET} is wrong",
        f"'{SECRET}'",
        f"x{SECRET}y{SECRET}",
        f"redis://:{SECRET}@host:6379/0 is away",
        f"https://host/{SECRET}/x",
        "redis://user:other-pw@host/0",
        "rediss://:other-pw@host/0?x=1",
        "https://us'er:other-pw@host/x",
        "https://host/file.safetensors?token=other-pw",
        f"HTTPS://host/file?a='b'&{QUERY}",
        f"('https://host/file?{QUERY}', 'https://other/file?{QUERY}#x')",
        f'{{"url":"https://host/file?{QUERY}"}}',
        f"Max retries exceeded with url: /file?a=b&{QUERY} (Caused by a reset)",
        "Authorization: Bearer other-pw",
        "{'authorization': 'bearer other-pw'}",
        "Authorization: Basic other-pw=",
        "Authorization: Token other-pw",
        'Authorization: Digest username="u", response="other-pw"',
        "{'Authorization': 'Token other-pw'}",
        r"{\"authorization\": \"Key other-pw\"}",
        "[('Authorization', b'Token other-pw')]",
        f"Max retries exceeded with url: /file?download&{QUERY} (Caused by a reset)",
        "Max retries exceeded with url: /file?other-pw (Caused by a reset)",
        "/file?=other-pw",
        "file.safetensors?~other-pw",
        "//user:other-pw@host/x",
        "//other-pw@host/x",
        "https:/user:other-pw@host/x",
        "https:user:other-pw@host/x",
        "user:x:other-pw@host",
        r"https:\/\/user:other-pw@host\/x",
        r"https:\/\/other-pw@host\/x",
        rf"b\'{{\"url\":\"https:\\/\\/u:other-pw@host\\/x?{QUERY}\"}}\'",
    ],
    ids=range(33),
)
def test_text_loses_its_secrets_and_keeps_what_surrounds_them(text: str) -> None:
    redacted = Redactor([SECRET])(f"before {text}\nafter")

    assert not any(word in redacted for word in (SECRET, "other-pw", "0a1b2c"))
    assert redacted.startswith("before")
    assert redacted.endswith("\nafter")


def test_the_public_parts_of_addresses_stay() -> None:
    text = "from https://u:p@host:8443/a/b.safetensors?sig=1 to redis://host:6379/0 (is it? yes)"

    assert Redactor()(text) == (
        "from https://host:8443/a/b.safetensors to redis://host:6379/0 (is it? yes)"
    )


@pytest.mark.parametrize(
    "text",
    [
        "is it there? yes",
        "(yes/no?)",
        "what?!",
        "'is it?', 'no'",
        "one@host ready.",
        "a@b.org: it fails",
        "at 12:30",
        "cozy://loras/anime@2",
        "s3://bucket/a@b",
        "file:///models/a@b",
        "a // b",
        "no authorization is set",
        "the token is wrong",
        "[config] .> transport: redis://host:6379/0",
    ],
    ids=range(14),
)
def test_text_that_resembles_a_secret_address_stays(text: str) -> None:
    assert Redactor()(f"{text} and so on") == f"{text} and so on"


@pytest.mark.parametrize(
    "secret", ["pass/wörd", 'it\'s"so"', "back\\slash", "tab\tbed", "smile😀y"], ids=range(5)
)
def test_a_secret_is_masked_in_every_quoting(secret: str) -> None:
    redact = Redactor([secret])
    quoted = json.dumps(secret)
    for spelling in (
        repr(secret),
        ascii(secret),
        quoted,
        json.dumps(secret, ensure_ascii=False),
        repr(secret.encode()),
        repr(quoted),
        json.dumps(quoted),
        quoted.replace("/", "\\/"),
        repr({"x": f'"{secret}'}),
        quote(secret, safe=""),
    ):
        redacted = redact(f"<{spelling}>")
        assert "***" in redacted
        for part in ("pass", "rd", "it", "so", "back", "slash", "tab", "bed", "smile", "😀"):
            assert part not in redacted


def test_secrets_shorter_than_six_characters_are_not_masked() -> None:
    assert Redactor(["a", "is", "word", ""])("a word is a word") == "a word is a word"


def test_the_longest_of_overlapping_secrets_is_masked() -> None:
    redact = Redactor(["s3cret", "s3cret-and-more"])

    assert redact("<s3cret-and-more> <s3cret>") == "<***> <***>"


# Without characters of masks and addresses: masking one part could otherwise make a secret.
_plain = st.characters(exclude_characters="*?:@#/", exclude_categories=["Cs"])


@settings(untimed, max_examples=50)
@given(
    secrets=st.lists(st.text(_plain, min_size=6), min_size=1, max_size=4),
    around=st.lists(st.text(_plain), min_size=5, max_size=5),
)
def test_no_secret_survives_anywhere(secrets: list[str], around: list[str]) -> None:
    text = "".join(part for pair in zip(around, [*secrets, ""], strict=False) for part in pair)

    redacted = Redactor(secrets)(text)

    assert not any(secret in redacted for secret in secrets)


def test_fields_that_take_a_word_are_not_redacted_like_prompts() -> None:
    assert sorted(ENUM_FIELDS) == sorted(enum_fields())
