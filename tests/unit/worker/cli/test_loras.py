"""`zlora loras`: list, show, check and add."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from support.embedding_files import sdxl, write_embedding
from support.fakes import write
from support.servers import by_path, digest, lora_bytes, serving
from zlora.cli import main
from zlora.lora.catalogue import Catalogue
from zlora_worker.settings import DEMO_CATALOGUE

GOOD = lora_bytes(1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZLORA_HOME", str(tmp_path))
    monkeypatch.setenv("ZLORA_LORA_FREE_BYTES", "0")
    monkeypatch.setenv("ZLORA_LORA_ROOTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def file(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a catalogue of one LoRA, with a comment and a secret."""
    made = home / "loras.toml"
    made.write_text(
        "# ours\n[loras.one]\nsource = 'https://u:pa55@x.invalid/[red].safetensors?token=s3cret'\n"
        "weight = 0.5\ntrigger_words = ['one', 'two']\nnotes = 'soft'\npinned = true\n"
        f"sha256 = '{'a' * 64}'"
    )
    monkeypatch.setenv("ZLORA_CATALOGUE", str(made))
    return made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["loras", *arguments])


def opened(file: Path) -> Catalogue:
    return Catalogue.load(file, variable="ZLORA_CATALOGUE")


@pytest.mark.usefixtures("file")
def test_list_and_show_print_entries_without_secrets() -> None:
    listed, shown = run("list"), run("show", "ONE")

    address = "https://x.invalid/[red].safetensors"
    assert listed.output == f"one: {address}, weight 0.5, one, two, pinned\n"
    assert f"source: {address}" in shown.output
    assert "trigger words: one, two\n" in shown.output
    (document,) = json.loads(run("list", "--json").output)
    assert document == json.loads(run("show", "one", "--json").output)
    assert document["source"] == address


@pytest.mark.usefixtures("file")
def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    result = run("show", "on")

    assert result.exit_code == 66
    assert "the nearest names: one" in result.output


def test_without_a_catalogue_there_is_nothing_to_list(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("list")

    assert result.exit_code == 2
    assert "set ZLORA_CATALOGUE, or --catalogue" in result.output
    monkeypatch.setenv("ZLORA_MODEL", "demo")
    assert "anime-style: demo://anime-style" in run("list").output


def test_check_reads_each_header_and_says_what_cannot_be_used(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a range request; a file of this machine is read as a worker reads it."""
    (home / "here.safetensors").write_bytes(GOOD)
    (home / "page.safetensors").write_bytes(b"<html>")
    made = home / "loras.toml"
    with serving(by_path({"/a": GOOD})) as host:
        monkeypatch.setenv("ZLORA_ALLOW_HOSTS", host.name)
        sources = {
            "good": f"{host.url}/a",
            "gone": f"{host.url}/b",
            "here": (home / "here.safetensors").as_uri(),
            "page": (home / "page.safetensors").as_uri(),
            "outside": "file:///etc/x.safetensors",
        }
        made.write_text(
            "".join(f"[loras.{name}]\nsource = '{url}'\n" for name, url in sources.items())
        )

        result = run("--catalogue", str(made), "check", "--json")
        some = run("--catalogue", str(made), "check", "good", "here")
        fetched = run("--catalogue", str(made), "check", "good", "--fetch", "--json")

    found = {one["name"]: one for one in json.loads(result.output)}
    assert result.exit_code == 1
    assert {name: one.get("code") for name, one in found.items()} == {
        "good": None,
        "gone": "lora_not_found",
        "here": None,
        "page": "not_safetensors",
        "outside": "lora_not_allowed",
    }
    assert found["here"]["sha256"] == digest(GOOD)
    assert "sha256" not in found["good"]
    assert some.exit_code == 0
    assert json.loads(fetched.output)[0]["sha256"] == digest(GOOD)


def test_add_appends_an_entry_that_reads_back(home: Path, file: Path) -> None:
    """A comment stays; the checksum of a pinned LoRA is that of the file."""
    source = home / "neon.safetensors"
    source.write_bytes(GOOD)
    before = file.read_text()

    result = run(
        *("add", "Neon Lights", source.as_uri(), "--weight", "0.7", "--pinned"),
        *("--trigger-word", 'a "neon" \\ sign', "--notes", "größer"),
    )
    alias = run("add", "strong", "lora://one", "--weight", "1.5")
    off = run("add", "off", "lora://one", "--weight", "0")

    assert (result.exit_code, alias.exit_code, off.exit_code) == (0, 0, 0), result.output
    assert opened(file).find("off").weight == 0
    assert "weight: 0.0\n" in run("show", "off").output
    assert file.read_text().startswith(before)
    entry = opened(file).find("neon lights")
    assert (entry.source, entry.sha256) == (source.as_uri(), digest(GOOD))
    assert (entry.weight, entry.pinned, entry.notes) == (0.7, True, "größer")
    assert entry.trigger_words == ('a "neon" \\ sign',)
    assert opened(file).find("strong").weight == 1.5
    assert run("add", "none", "lora://one", "--weight", "0").exit_code == 0
    assert opened(file).find("none").weight == 0


def test_an_embedding_can_be_in_a_catalogue(home: Path) -> None:
    source, made = write_embedding(home, sdxl()), home / "new.toml"

    added = run("--catalogue", str(made), "add", "fish", source.as_uri())
    checked = run("--catalogue", str(made), "check")

    assert (added.exit_code, checked.exit_code) == (0, 0), added.output
    assert checked.output.startswith("fish: embedding, SDXL, ")


def test_the_base_model_of_a_catalogue_is_named_by_an_option(home: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    source = write(home / "a.safetensors", {f"{module}.lora_down.weight": torch.ones(2, 768)})
    catalogue = ("--catalogue", str(home / "new.toml"))

    refused = run(*catalogue, "add", "one", source.as_uri())
    added = run(*catalogue, "add", "one", source.as_uri(), "--base", "SD 1.x")
    checked = [run(*catalogue, "check", "--base", base) for base in ("SDXL", "SD 2.x", "SD 1.x")]

    assert "made for SD 1.x, not for SDXL" in " ".join(refused.output.split())
    assert added.exit_code == 0, added.output
    assert [one.exit_code for one in checked] == [1, 1, 0]


def test_a_catalogue_may_be_for_z_image(home: Path) -> None:
    module = "lora_unet_layers_0_attention_qkv"
    source = write(home / "a.safetensors", {f"{module}.lora_down.weight": torch.ones(2, 3840)})
    catalogue = ("--catalogue", str(home / "new.toml"))

    added = run(*catalogue, "add", "one", source.as_uri(), "--base", "Z-Image")
    checked = run(*catalogue, "check", "--base", "Z-Image")

    assert (added.exit_code, checked.exit_code) == (0, 0), added.output
    assert checked.output.startswith("one: LoRA, Z-Image, ")


def test_the_catalogue_of_the_demo_model_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZLORA_MODEL", "demo")
    before = DEMO_CATALOGUE.read_text()

    result = run("add", "new", "demo://neon-lights", "--no-check")

    assert (result.exit_code, DEMO_CATALOGUE.read_text()) == (2, before)


def test_add_takes_the_trigger_words_of_the_header(home: Path) -> None:
    source, made = home / "neon.safetensors", home / "new.toml"
    source.write_bytes(lora_bytes(1, trigger="neon, glow"))

    result = run("--catalogue", str(made), "add", "neon", source.as_uri())

    assert result.exit_code == 0, result.output
    assert opened(made).find("neon").trigger_words == ("neon", "glow")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("one", "owner/x", "--no-check"), "there is a LoRA of this name already"),
        (("ONE", "owner/x", "--no-check"), "are one name in upper or lower case"),
        (("a:b", "owner/x", "--no-check"), "expected a name"),
        (("new", "ftp://x/y", "--no-check"), "is not a URL of"),
        (("new", "lora://on", "--no-check"), "the nearest names: one"),
        (("new", "owner/x", "--no-check", "--pinned"), "`pinned` needs `sha256`"),
        (("new", "owner/x", "--no-check", "--weight", "9"), "weight"),
        (("new", "owner/x", "--no-check", "--notes", "\udcff"), "surrogates not allowed"),
        (("new", "file:///etc/x"), "not in the folders of ZLORA_LORA_ROOTS"),
    ],
)
def test_a_wrong_entry_is_not_added(file: Path, arguments: tuple[str, ...], reason: str) -> None:
    before = file.read_bytes()

    result = run("add", *arguments)

    assert result.exit_code != 0
    assert reason in " ".join(result.output.split())
    assert file.read_bytes() == before


def test_a_pipe_is_no_catalogue(home: Path) -> None:
    """Opening a pipe would wait for a writer."""
    os.mkfifo(home / "pipe")

    result = run("--catalogue", str(home / "pipe"), "add", "new", "owner/x", "--no-check")

    assert result.exit_code == 2
    assert "not a regular file" in result.output
