"""The catalogue: its file, names, and the requests that use them."""

from pathlib import Path

import pytest
from msgspec import structs
from zlora.errors import InvalidRequest, InvalidSetting, LoraNotAllowed, LoraNotFound
from zlora.lora.catalogue import Catalogue, parse_rows
from zlora.prompt_syntax import parse
from zlora.schema import Asset, GenerateRequest, LoraSpec, parse_request

ONE, OTHER = "a" * 64, "b" * 64
TEXT = f"""
[loras.watercolor]
source = "https://user:pa55@loras.invalid/watercolor.safetensors?token=s3cret"
sha256 = "{ONE}"
weight = 0.8
trigger_words = ["watercolor painting", "paper texture"]
recipe = "lcm"
notes = "soft"

[loras."Neon Lights"]
source = "owner/neon"

[loras.strong-watercolor]
source = "lora://Watercolor"
weight = 1.5
pinned = true
"""


def catalogue(text: str = TEXT, *, only: bool = False) -> Catalogue:
    return Catalogue(parse_rows(text), only=only)


def a_request(*files: dict[str, str], **fields: object) -> GenerateRequest:
    return parse_request({"prompt": "a", "loras": [{"file": file} for file in files]} | fields)


# --- names


@pytest.mark.parametrize(
    "file",
    [
        {"url": "lora://watercolor"},
        {"url": "LORA://WaterColor"},
        {"ref": "lora://watercolor"},
        {"ref": "watercolor"},
    ],
)
def test_a_name_stands_for_the_file_and_weight_of_its_entry(file: dict[str, str]) -> None:
    found, (entry,) = catalogue().resolve(a_request(file))

    (spec,) = found.loras
    assert spec.file.address.startswith("https://user:pa55@loras.invalid/watercolor")
    assert spec.file.sha256 == ONE
    assert spec.component_weights == (0.8, 0.8)
    assert spec.adapter_name == "watercolor"
    assert entry is not None
    assert (entry.name, entry.recipe, entry.notes) == ("watercolor", "lcm", "soft")


def test_what_the_request_says_wins_over_the_entry() -> None:
    spec = LoraSpec(
        file=Asset(ref="watercolor"), weight=0.2, text_encoder_weight=0.0, adapter_name="mine"
    )

    found, _ = catalogue().resolve(GenerateRequest(prompt="a", loras=(spec,)))

    assert found.loras[0].component_weights == (0.2, 0.0)
    assert found.loras[0].adapter_name == "mine"


def test_a_name_may_have_spaces_as_file_names_have() -> None:
    for address in ("lora://Neon Lights", "lora://neon%20lights"):
        found, _ = catalogue().resolve(a_request({"url": address}))
        assert found.loras[0].file == Asset(url="owner/neon")


def test_an_entry_may_be_another_name_of_a_file_with_another_weight() -> None:
    found, (entry,) = catalogue().resolve(a_request({"ref": "strong-watercolor"}))

    assert found.loras[0].file.sha256 == ONE
    assert found.loras[0].weight == 1.5
    assert entry is not None
    assert entry.trigger_words == ("watercolor painting", "paper texture")
    assert (entry.recipe, entry.pinned, entry.notes) == ("lcm", True, "")


def test_an_unknown_name_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(LoraNotFound, match="no such name in the catalogue") as caught:
        catalogue().resolve(a_request({"ref": "watercolor"}, {"url": "lora://watercolour"}))

    assert caught.value.details == {
        "nearest": ["watercolor", "strong-watercolor"],
        "index": 1,
    }
    assert "nearest names: watercolor, strong-watercolor" in str(caught.value)


def test_a_name_is_refused_by_a_worker_without_a_catalogue() -> None:
    with pytest.raises(LoraNotFound, match="lora://x: this worker has no catalogue"):
        Catalogue().resolve(a_request({"url": "lora://x"}))


@pytest.mark.parametrize("text", ["", TEXT])
def test_an_unknown_name_is_shown_without_secrets(text: str) -> None:
    with pytest.raises(LoraNotFound, match=r"^lora://x\.invalid/one: ") as caught:
        catalogue(text).resolve(a_request({"url": "lora://u:pa55@x.invalid/one?token=s3cret"}))

    assert "pa55" not in f"{caught.value} {caught.value.details}"


def test_other_addresses_stay_as_they_are() -> None:
    request = a_request({"url": "hf://a/b/c"}, {"ref": "loras/x"}, {"cozy_ref": "watercolor"})

    found, entries = catalogue().resolve(request)

    assert found == request
    assert entries == (None, None, None)


def test_a_sha256_that_contradicts_the_entry_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalogue().resolve(a_request({"ref": "watercolor", "sha256": OTHER}))

    assert caught.value.details["path"] == "$.loras[0].file.sha256"
    assert ONE in caught.value.details["expected"]


# --- prompts


def test_a_tag_of_the_prompt_is_a_lora_of_the_catalogue() -> None:
    """The first number is for the text encoders; a tag without one has the weight of the entry."""
    request = parse_request(
        {
            "prompt": "a <lora:WaterColor> cat <lora:Neon Lights:0.3><lora:watercolor:0.2:0.4>",
            "prompt_syntax": "a1111",
            "loras": [{"file": {"url": "https://loras.invalid/x"}, "weight": 0.9}],
        }
    )

    found, entries = catalogue().resolve(request)

    assert found.prompt == "a  cat"
    assert [spec.component_weights for spec in found.loras] == [
        (0.9, 0.9),
        (0.8, 0.8),
        (0.3, 0.3),
        (0.4, 0.2),
    ]
    assert [entry and entry.name for entry in entries] == [
        None,
        "watercolor",
        "Neon Lights",
        "watercolor",
    ]


def test_strengths_over_steps_replace_the_weight_of_the_entry() -> None:
    request = a_request({"ref": "watercolor"})
    spec = structs.replace(request.loras[0], weights=((0.0, 1.0), (0.5, 0.3)))

    found, _ = catalogue().resolve(structs.replace(request, loras=(spec,)))

    assert found.loras[0].weight is None
    assert found.loras[0].weights == spec.weights


def test_a_tag_is_text_in_a_plain_prompt() -> None:
    request = parse_request({"prompt": "a <lora:watercolor:1> cat"})

    assert catalogue().resolve(request) == (request, ())


def test_a_tag_with_an_unknown_name_is_refused() -> None:
    request = parse_request({"prompt": "a <lora:x/?#water color:1>", "prompt_syntax": "a1111"})

    with pytest.raises(LoraNotFound, match=r"lora://x/[?]#water color: no such name") as caught:
        catalogue().resolve(request)
    assert caught.value.details["nearest"] == ["watercolor", "strong-watercolor"]


def test_more_loras_than_a_request_may_have_are_refused_before_the_queue() -> None:
    request = {
        "prompt": "<lora:a:1><lora:b:1>",
        "prompt_syntax": "a1111",
        "loras": [{"file": {"url": "owner/x"}}] * 7,
    }

    with pytest.raises(InvalidRequest) as caught:
        parse_request(request)
    assert caught.value.details["path"] == "$.prompt"
    assert "at most 8 LoRAs in prompt and `loras`, got 9" in caught.value.details["expected"]


def test_trigger_words_follow_the_prompt_once() -> None:
    text = """
        [loras.a]
        source = "owner/a"
        trigger_words = ["Ink (old)", "art"]
        [loras.b]
        source = "owner/b"
        trigger_words = ["art", "AND"]
        """
    files = [{"file": {"ref": name}} for name in "ab"]
    plain = parse_request({"prompt": "a party", "loras": files, "trigger_words": "add"})
    weighted = parse_request(
        {
            "prompt": "(art:1.2)",
            "loras": files,
            "trigger_words": "add",
            "prompt_syntax": "a1111",
        }
    )

    assert catalogue(text).resolve(plain).request.prompt == "a party, Ink (old), art, AND"
    found = catalogue(text).resolve(weighted).request
    assert found.prompt == r"(art:1.2), Ink \(old\), \AND"
    assert (
        "".join(part.text for part in parse(found.prompt, "a1111").sections[0])
        == "art, Ink (old), AND"
    )


def test_a_prompt_that_is_too_long_with_its_trigger_words_is_refused() -> None:
    request = a_request({"ref": "watercolor"}, trigger_words="add", prompt="x" * 9_990)

    with pytest.raises(InvalidRequest, match=r"\$\.prompt: .*<= 10000"):
        catalogue().resolve(request)


# --- a closed catalogue


@pytest.mark.parametrize(
    "file",
    [
        {"url": "https://loras.invalid/other.safetensors"},
        {"cozy_ref": "watercolor"},
        {"ref": "loras/watercolor"},
        {"url": "owner/other"},
        # a sha256 alone would choose any file of the cache
        {"url": "https://loras.invalid/other.safetensors", "sha256": ONE},
    ],
)
def test_a_closed_catalogue_serves_nothing_else(file: dict[str, str]) -> None:
    with pytest.raises((LoraNotAllowed, LoraNotFound)):
        catalogue(only=True).resolve(a_request(file))


def test_a_closed_catalogue_takes_no_sha256_that_the_entry_does_not_name() -> None:
    with pytest.raises(InvalidRequest, match=r"file\.sha256: Expected none"):
        catalogue(only=True).resolve(a_request({"ref": "neon lights", "sha256": ONE}))


def test_a_closed_catalogue_draws_the_request_of_a_result_again() -> None:
    """Its addresses have no query, and are spelled as receipts spell them."""
    file = {"url": "https://loras.invalid/watercolor.safetensors", "sha256": ONE}

    found, (entry,) = catalogue(only=True).resolve(a_request(file))

    assert "token=s3cret" in found.loras[0].file.address
    assert entry is not None


def test_the_catalogue_names_files_of_embeddings_too_and_closes_them() -> None:
    named, other = ({"file": {"ref": name}} for name in ("watercolor", "owner/x"))
    request = parse_request({"prompt": "a", "embeddings": [named]})
    refused = parse_request({"prompt": "a", "embeddings": [named, other]})

    found, entries = catalogue(only=True).resolve(request)

    assert found.embeddings[0].file == catalogue().find("watercolor").asset
    assert entries == ()
    with pytest.raises(LoraNotAllowed) as caught:
        catalogue(only=True).resolve(refused)
    assert caught.value.details == {"index": 1, "field": "embeddings"}


# --- the file


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[loras.a", "not TOML"),
        ("[" * 100_000, "not TOML"),
        ('[loras.a]\nsource="x/y"\n[loras.a]\nsource="x/z"', "not TOML.*a"),
        ("[lora.a]\nsource='x/y'", r"expected tables \[loras.<name>\] only, got lora"),
        ("loras = 3", "expected tables"),
        ("[loras.a]\nsource='x/y'\nwieght=1", "a: .*unknown field `wieght`"),
        ("[loras.a]\nweight=1", "a: .*missing required field `source`"),
        ("[loras.a]\nsource='x/y'\nweight=nan", r"a: .*\$\.weight"),
        ("[loras.a]\nsource='x/y'\nsha256='A'", r"a: .*\$\.sha256"),
        ("[loras.a]\nsource='x/y'\ntrigger_words=['a\\nb']", None),
        ('[loras.a]\nsource="x/y"\ntrigger_words=["a\\nb"]', r"a: .*\$\.trigger_words"),
        ("[loras.'a:b']\nsource='x/y'", "a:b: expected a name"),
        ("[loras.'a ']\nsource='x/y'", "a : expected a name"),
        ("[loras.a]\nsource='x/y'\n[loras.A]\nsource='x/z'", "A and a are one name"),
        ("[loras.a]\nsource='ftp://u:pw@x/y'", "a: its source ftp://x/y is not a URL of"),
        ("[loras.a]\nsource='lora://a'", "a: its source leads back to itself: a -> a"),
        (
            "[loras.a]\nsource='lora://b'\n[loras.b]\nsource='lora://c'\n[loras.c]\nsource='lora://B'",
            "a: its source leads back to itself: b -> c -> b",
        ),
        (
            "[loras.neon]\nsource='x/y'\n[loras.b]\nsource='lora://neom'",
            "b: its source lora://neom is not in the catalogue; the nearest names: neon",
        ),
        (
            f"[loras.a]\nsource='x/y'\nsha256='{ONE}'\n[loras.b]\nsource='x/y'\nsha256='{OTHER}'",
            "b and a: one source with two sha256",
        ),
        (
            (
                f"[loras.a]\nsource='x/y'\nsha256='{ONE}'\n"
                f"[loras.b]\nsource='lora://a'\nsha256='{OTHER}'"
            ),
            "b: its sha256 is not that of a",
        ),
        ("[loras.a]\nsource='x/y'\npinned=true", "a: `pinned` needs `sha256`"),
        (
            "".join(f"[loras.n{i}]\nsource='lora://n{i + 1}'\n" for i in range(2000)),
            "n0: its file is more than 10 names away",
        ),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_its_name_and_reason(
    tmp_path: Path, text: str, reason: str | None
) -> None:
    file = tmp_path / "loras.toml"
    file.write_text(text)
    if reason is None:
        Catalogue.load(file, variable="ZLORA_CATALOGUE")
        return

    with pytest.raises(InvalidSetting, match=rf"ZLORA_CATALOGUE=.*loras\.toml: {reason}") as caught:
        Catalogue.load(file, variable="ZLORA_CATALOGUE")
    assert caught.value.details == {"name": "ZLORA_CATALOGUE"}
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("data", [None, b"\xff", b"#" * (4 * 2**20 + 1)])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, data: bytes | None) -> None:
    file = tmp_path / "loras.toml"
    if data is not None:
        file.write_bytes(data)

    with pytest.raises(InvalidSetting, match="ZLORA_CATALOGUE="):
        Catalogue.load(file, variable="ZLORA_CATALOGUE")


def test_a_page_of_many_versions_is_no_source_of_a_closed_catalogue() -> None:
    with pytest.raises(ValueError, match=r"a: .*a page of many versions"):
        catalogue("[loras.a]\nsource='https://civitai.com/models/1'", only=True)
