"""Settings of the worker: each variable is read, errors name it, and secrets stay hidden."""

import hashlib
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
from zlora import config
from zlora.broker.celery_app import VISIBILITY
from zlora.errors import InvalidSetting
from zlora.lora.addresses import HUGGING_FACE
from zlora_worker.setting_parsers import NamedModel
from zlora_worker.settings import DEMO_LORAS, Settings, reference

READ: list["Field[Any]"] = [item for item in fields(Settings) if item.metadata]

# For each field: a text of its variable, other than the default, and the value that it means.
VALUES: dict[str, tuple[str, object]] = {
    "queue": ("other", "other"),
    "model": ("demo", "demo"),
    "model_revision": ("v1", "v1"),
    "model_config": ("/models/config", "/models/config"),
    "vae": ("owner/vae", "owner/vae"),
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("bfloat16", "bfloat16"),
    "compile": ("blocks", "blocks"),
    "load_timeout": ("60", 60),
    "job_timeout": ("3600", 3600),
    "max_attempts": ("5", 5),
    "max_losses": ("20", 20),
    "hard_grace": ("10", 10),
    "shutdown_timeout": ("20", 20),
    "visibility": ("60", 60),
    "sweep": ("2", 2),
    "sidecar_timeout": ("90", 90),
    "probes": ("/run/zlora", "/run/zlora"),
    "spool": ("/run/images", "/run/images"),
    "spool_bytes": ("1000", 1000),
    "metrics": ("127.0.0.1:9808", ("127.0.0.1", 9808)),
    "log": ("json", "json"),
    "prompts": ("hashed", "hashed"),
    "models": (
        "a=owner/model@v1, b=demo,c=/models/x@1.safetensors",
        (
            NamedModel("a", "owner/model", "v1"),
            NamedModel("b", "demo", ""),
            NamedModel("c", "/models/x@1.safetensors", ""),
        ),
    ),
    "models_bytes": ("0", 0),
    "store": ("s3://bucket/prefix", "s3://bucket/prefix"),
    "s3_endpoint": ("http://localhost:9000", "http://localhost:9000"),
    "s3_public_endpoint": ("https://s3.example.com", "https://s3.example.com"),
    "s3_addressing": ("virtual", "virtual"),
    "s3_put": ('{"StorageClass": "STANDARD_IA"}', {"StorageClass": "STANDARD_IA"}),
    "urls": ("presigned, key", ("presigned", "key")),
    "public_url": ("https://cdn.example.com/pictures/", "https://cdn.example.com/pictures"),
    "url_seconds": ("600", 600),
    "inline_bytes": ("0", 0),
    "catalogue": (__file__, __file__),
    "loras": ("catalogue", "catalogue"),
    "lora_cache": ("/cache", "/cache"),
    "lora_cache_bytes": ("1000", 1000),
    "lora_max_bytes": ("100", 100),
    "lora_memory_bytes": ("10", 10),
    "image_max_bytes": ("10", 10),
    "image_max_pixels": ("10", 10),
    "lora_deadline": ("5", 5),
    "lora_free_bytes": ("0", 0),
    "lora_min_rate": ("1", 1),
    "look_ahead": ("0", 0),
    "patch": ("inplace", "inplace"),
    "base_check": ("all", "all"),
    "allow_hosts": (
        "Example.COM, 10.0.0.1:8080,,[::1]:80",
        frozenset({"example.com", "10.0.0.1:8080", "[::1]:80"}),
    ),
    "certificates": (__file__, __file__),
    "lora_roots": ("/models, /mnt/loras,", (Path("/models"), Path("/mnt/loras"))),
    "lora_buckets": ("loras, shared/team-a/", ("loras", "shared/team-a")),
    "lora_s3_endpoint": ("http://localhost:9001", "http://localhost:9001"),
    "lora_s3_region": ("eu-west-1", "eu-west-1"),
    "lora_s3_key": ("key", "key"),
    "lora_s3_secret": ("s3cret", "s3cret"),
    "lora_s3_token": ("t0ken", "t0ken"),
    "hf_endpoint": ("https://mirror.example.com", "https://mirror.example.com"),
    "hf_token": ("t0ken", "t0ken"),
    "civitai_url": ("https://civitai.example.com", "https://civitai.example.com"),
    "civitai_token": ("t0ken", "t0ken"),
    "hub_url": ("https://hub.example.com", "https://hub.example.com"),
    "hub_token": ("t0ken", "t0ken"),
    "hub_tenant": ("tenant", "tenant"),
    "webhook_secret": ("whsec_" + "a" * 32, "whsec_" + "a" * 32),
}

# Variables that are required together with a field's own.
HALVES = {
    "lora_s3_key": {"ZLORA_LORA_S3_SECRET_ACCESS_KEY": "s3cret"},
    "lora_s3_secret": {"ZLORA_LORA_S3_ACCESS_KEY_ID": "key"},
}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a worker with nothing but a data folder."""
    return {"ZLORA_HOME": str(tmp_path)}


# --- reading


def test_every_field_is_part_of_these_tests() -> None:
    assert set(VALUES) == {item.name for item in READ}
    assert {item.name for item in fields(Settings)} - set(VALUES) == {
        "home",
        "broker_url",
        "result_backend",
    }


@pytest.mark.parametrize("item", READ, ids=lambda item: item.name)
def test_each_variable_of_a_field_is_read(home: dict[str, str], item: "Field[Any]") -> None:
    text, value = VALUES[item.name]
    home |= HALVES.get(item.name, {})

    for name in item.metadata["names"]:
        assert getattr(Settings.from_env({**home, name: text}), item.name) == value


@pytest.mark.parametrize("item", READ, ids=lambda item: item.name)
def test_the_first_variable_that_is_not_empty_is_used(
    home: dict[str, str], item: "Field[Any]"
) -> None:
    first, *others = item.metadata["names"]
    text, value = VALUES[item.name]
    home |= HALVES.get(item.name, {})

    assert (
        getattr(Settings.from_env({**home, first: text, **dict.fromkeys(others, "7")}), item.name)
        == value
    )
    if item.name in HALVES:
        return  # one half without the other is refused
    assert getattr(
        Settings.from_env({**home, first: "", **dict.fromkeys(others, text)}), item.name
    ) == (value if others else getattr(Settings.from_env(home), item.name))


def test_shared_variables_have_the_same_meaning_as_for_clients(tmp_path: Path) -> None:
    environ = {"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL": "redis://b/1"}

    assert Settings.from_env(environ).home == tmp_path
    assert (
        Settings.from_env(environ).broker_url
        == Settings.from_env(environ).result_backend
        == "redis://b/1"
    )
    assert (
        Settings.from_env(environ | {"ZLORA_RESULT_BACKEND": "redis://r/2"}).result_backend
        == "redis://r/2"
    )
    assert Settings.from_env({"ZLORA_HOME": str(tmp_path)}).broker_url == config.DEFAULT_BROKER


def test_urls_of_sites_are_normalised(home: dict[str, str]) -> None:
    """Else a public site would get the permissions of an operator's own."""
    for text in (
        "https://HuggingFace.co",
        "HTTPS://huggingface.co/",
        "https://huggingface.co:443//",
    ):
        assert Settings.from_env({**home, "HF_ENDPOINT": text}).hf_endpoint == HUGGING_FACE
    assert (
        Settings.from_env({**home, "COZY_HUB_URL": "http://u:P@Hub:80/A/"}).hub_url
        == "http://u:P@hub/A"
    )


def test_an_unset_variable_means_its_default(home: dict[str, str]) -> None:
    plain = Settings.from_env(home)

    assert (plain.queue, plain.model) == ("gpu", "stabilityai/stable-diffusion-xl-base-1.0")
    assert (plain.device, plain.dtype, plain.load_timeout) == ("auto", "auto", 1800)
    assert (plain.lora_cache_bytes, plain.lora_max_bytes, plain.lora_deadline) == (
        20_000_000_000,
        2**31,
        300,
    )
    assert (plain.job_timeout, plain.hard_grace, plain.shutdown_timeout) == (870, 30, 0)
    assert (plain.visibility, plain.sweep, plain.probes) == (VISIBILITY, 15, "")
    assert plain.job_timeout + plain.hard_grace == 900  # seconds: the hard limit of 15 minutes
    assert (plain.allow_hosts, plain.hub_url, plain.hub_token, plain.store) == (
        frozenset(),
        "",
        "",
        "",
    )


def test_only_the_demo_model_serves_demo_loras(home: dict[str, str]) -> None:
    assert Settings.from_env(home | {"ZLORA_MODEL": "demo"}).serves_demo_model
    assert not Settings.from_env(home).serves_demo_model


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "CIVITAI_TOKEN", "COZY_HUB_TOKEN", "COZY_TENANT_ID", "ZLORA_LORA_S3_REGION"],
)
def test_credentials_change_the_fingerprint(home: dict[str, str], name: str) -> None:
    """Settings that do not decide what a source answers leave it as it is."""
    plain = Settings.from_env(home).credentials_fingerprint
    changed = Settings.from_env(home | {name: "a"}).credentials_fingerprint

    assert (changed != plain) == (name != "ZLORA_LORA_S3_REGION")
    assert Settings.from_env(home | {"ZLORA_QUEUE": "a"}).credentials_fingerprint == plain


def test_store_and_cache_are_in_the_data_folder_by_default(
    home: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert Settings.from_env(home).store_url == (tmp_path / "store").as_uri()
    assert Settings.from_env(home).cache_folder == tmp_path / "loras"
    assert Settings.from_env(home | {"ZLORA_STORE": "s3://b"}).store_url == "s3://b"
    assert (
        Settings.from_env(home | {"ZLORA_LORA_CACHE": "relative"}).cache_folder
        == tmp_path / "relative"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings.from_env(home | {"ZLORA_LORA_CACHE": "~/x"}).cache_folder == tmp_path / "x"


def test_ipv6_addresses_are_in_brackets(home: dict[str, str]) -> None:
    assert Settings.from_env(home | {"ZLORA_METRICS": "[::1]:9808"}).metrics == ("::1", 9808)
    assert Settings.from_env(home).metrics is None


# --- secrets in files


SECRET: list["Field[Any]"] = [item for item in READ if item.metadata["secret"]]


@pytest.mark.parametrize(
    ("field", "name"),
    [
        *((item.name, name) for item in SECRET for name in item.metadata["names"]),
        ("lora_s3_key", "ZLORA_LORA_S3_ACCESS_KEY_ID"),
        ("broker_url", "ZLORA_BROKER_URL"),
        ("result_backend", "ZLORA_RESULT_BACKEND"),
    ],
)
def test_a_secret_can_be_read_from_a_file(
    home: dict[str, str], tmp_path: Path, field: str, name: str
) -> None:
    text, value = VALUES.get(field, ("redis://:s3cret@b/1",) * 2)
    home |= HALVES.get(field, {})
    file = tmp_path / "secret"
    file.write_text(f"{text}\n")

    assert getattr(Settings.from_env({**home, f"{name}_FILE": str(file)}), field) == value
    with pytest.raises(InvalidSetting, match=f"{name} and {name}_FILE") as both:
        Settings.from_env({**home, name: text, f"{name}_FILE": str(file)})
    with pytest.raises(
        InvalidSetting, match=f"{name}_FILE=/nowhere/secret: No such file"
    ) as absent:
        Settings.from_env({**home, f"{name}_FILE": "/nowhere/secret"})
    assert (both.value.details, absent.value.details) == ({"name": name}, {"name": f"{name}_FILE"})
    assert text not in str(both.value)


def test_an_invalid_secret_from_a_file_is_not_shown(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret, and no secret of webhooks")

    with pytest.raises(InvalidSetting, match="ZLORA_WEBHOOK_SECRET") as raised:
        Settings.from_env({**home, "ZLORA_WEBHOOK_SECRET_FILE": str(tmp_path / "secret")})
    assert "s3cret" not in str(raised.value)


# --- invalid values


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ZLORA_DTYPE", "fp16"),
        *(
            (name, text)
            for name in (
                "ZLORA_LOAD_TIMEOUT",
                "ZLORA_JOB_TIMEOUT",
                "ZLORA_HARD_GRACE",
                "ZLORA_VISIBILITY",
                "ZLORA_SWEEP",
                "ZLORA_LORA_CACHE_BYTES",
                "ZLORA_LORA_MAX_BYTES",
                "ZLORA_LORA_DEADLINE",
            )
            for text in ("0", "20GB")
        ),
        *(
            (name, text)
            for name in (
                "ZLORA_SHUTDOWN_TIMEOUT",
                "ZLORA_LORA_FREE_BYTES",
                "ZLORA_LORA_MIN_RATE",
                "ZLORA_LOOK_AHEAD",
            )
            for text in ("-1", "1.5")
        ),
        *(
            ("ZLORA_METRICS", text)
            for text in (
                "9808",
                "h",
                ":1",
                "h:0",
                "h:65536",
                "h:x",
                "u@h:1",
                "h:1/metrics",
                "http://h:1",
                "::1:1",
            )
        ),
        ("ZLORA_LOG", "yaml"),
        ("ZLORA_PROMPTS", "hidden"),
        ("ZLORA_CA_BUNDLE", "/nowhere/ca.pem"),
        ("ZLORA_LORA_ROOTS", "/models, loras"),
        *(("ZLORA_LORA_S3", text) for text in ("two words", "ok, a/../b", "a//b", "s3://a")),
        ("HF_ENDPOINT", "huggingface.co"),
        ("ZLORA_S3_ENDPOINT", "localhost:9000"),
        ("ZLORA_LOOK_AHEAD", "65"),
        ("ZLORA_ALLOW_HOSTS", "http://example.com"),
        ("ZLORA_ALLOW_HOSTS", "example.com/loras"),
        ("ZLORA_ALLOW_HOSTS", "ok.example.com, example.com:0"),
        ("ZLORA_ALLOW_HOSTS", "example.com:99999"),
        ("ZLORA_ALLOW_HOSTS", "example.com:https"),
        ("ZLORA_ALLOW_HOSTS", "::1"),
        ("ZLORA_ALLOW_HOSTS", "10.0.0.0/8"),
        ("ZLORA_ALLOW_HOSTS", "[::1"),
        ("ZLORA_ALLOW_HOSTS", "user@example.com"),
        ("COZY_HUB_URL", "http://["),
        *(
            ("ZLORA_STORE", text)
            for text in (
                "/srv/pictures",
                "pictures",
                "https://example.com/x",
                "file://host/folder",
                "file:",
                "file:a",
                "file:/a",
                "file:///a#b",
                "file:///a?b",
                "s3://",
                "s3:///prefix",
                "s3://two words/x",
                "s3://Bad_Bucket!",
                "gs://b",
                "s3://[",
            )
        ),
        ("COZY_HUB_URL", "http://hub.example.com:99999"),
        *(
            ("ZLORA_MODELS", text)
            for text in ("demo", "=demo", "a=", "a b=demo", "a=demo,a=other", "a" * 101 + "=demo")
        ),
        ("ZLORA_MODELS_BYTES", "-1"),
    ],
)
def test_an_invalid_value_is_refused_with_the_name_of_its_variable(
    home: dict[str, str], name: str, text: str
) -> None:
    with pytest.raises(InvalidSetting, match=name) as raised:
        Settings.from_env({**home, name: text})

    assert raised.value.details == {"name": name}
    assert text in str(raised.value)


def test_an_access_key_without_its_secret_is_refused(home: dict[str, str]) -> None:
    for name in ("ZLORA_LORA_S3_ACCESS_KEY_ID", "ZLORA_LORA_S3_SECRET_ACCESS_KEY"):
        with pytest.raises(InvalidSetting, match=name) as raised:
            Settings.from_env({**home, name: "s3cret"})
        assert "s3cret" not in str(raised.value)


# --- secrets


@pytest.mark.parametrize(
    "text", ["s3://key:s3cret@bucket/prefix", "https://key:s3cret@example.com/x"]
)
def test_an_error_shows_no_password(home: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidSetting, match="ZLORA_STORE") as raised:
        Settings.from_env({**home, "ZLORA_STORE": text})

    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("FILE_API_TOKEN", "s3cret"),
        ("COZY_HUB_TOKEN", "s3cret"),
        ("HF_TOKEN", "s3cret"),
        ("CIVITAI_TOKEN", "s3cret"),
        ("ZLORA_BROKER_URL", "redis://:s3cret@localhost/0"),
        ("ZLORA_BROKER_URL", "redis://user:s3cret@localhost/0"),
        ("ZLORA_BROKER_URL", "redis://user:p@s3cret@localhost/0"),
        ("ZLORA_BROKER_URL", "sentinel://:s3cret@a,localhost/0?master=z&sentinel_password=s3cret"),
        ("ZLORA_RESULT_BACKEND", "rediss://:s3cret@localhost/0"),
        ("ZLORA_S3_ENDPOINT", "http://key:s3cret@localhost:9000"),
        ("COZY_HUB_URL", "https://user:s3cret@hub.example.com"),
        ("ZLORA_WEBHOOK_SECRET", "whsec_s3cret" + "a" * 26),
    ],
)
def test_repr_shows_no_secret(home: dict[str, str], name: str, text: str) -> None:
    """Only that there is one, and the host that it is for."""
    shown = repr(Settings.from_env({**home, name: text}))

    assert "s3cret" not in shown
    assert "***" in shown
    assert ("localhost" in shown) or "localhost" not in text


def test_secrets_has_every_value_that_must_not_be_shown(home: dict[str, str]) -> None:
    """Each of several in one variable, and passwords both URL-encoded and decoded."""
    environ = {item.metadata["names"][0]: f"word-of-{item.name}" for item in SECRET}
    environ |= {
        "ZLORA_S3_PUT": '{"SSECustomerKey": "word-of-s3_put"}',
        "ZLORA_LORA_S3_ACCESS_KEY_ID": "key",
    }
    environ |= {
        "ZLORA_WEBHOOK_SECRET": " ".join(signers := ["whsec_" + letter * 32 for letter in "ab"])
    }
    environ |= {
        "ZLORA_BROKER_URL": "redis://:br%40ker@h/0",
        "ZLORA_RESULT_BACKEND": "redis://user:backend@h/0",
    }

    found = Settings.from_env({**home, **environ}).secrets

    words = {f"word-of-{item.name}" for item in SECRET if item.name != "webhook_secret"}
    assert set(filter(None, found)) == words | {*signers, "br%40ker", "br@ker", "backend"}
    assert not any(Settings.from_env(home).secrets)


def test_repr_shows_everything_else(home: dict[str, str], tmp_path: Path) -> None:
    shown = repr(
        Settings.from_env(
            {**home, "ZLORA_BROKER_URL": "redis://h/1", "ZLORA_ALLOW_HOSTS": "one.example.com"}
        )
    )

    for part in (str(tmp_path), "redis://h/1", "one.example.com", "queue='gpu'", "hub_token=''"):
        assert part in shown
    assert "***" not in shown


def test_settings_are_immutable(home: dict[str, str]) -> None:
    read = Settings.from_env(home)

    with pytest.raises(AttributeError):
        read.queue = "other"  # type: ignore[misc]


# --- reference


def test_the_reference_has_a_row_for_every_variable() -> None:
    rows = list(reference())

    assert [row.names for row in rows[:3]] == [
        (config.BROKER_URL,),
        (config.RESULT_BACKEND,),
        (config.HOME,),
    ]
    assert [(row.names, row.default, row.note) for row in rows[3:]] == [
        (item.metadata["names"], item.metadata["default"], item.metadata["note"]) for item in READ
    ]
    assert all(item.default is MISSING for item in fields(Settings))
    for row in rows:
        assert row.note.endswith(".")
        assert "|" not in row.note


# --- the catalogue of LoRAs


def test_the_first_of_several_models_takes_the_place_of_the_model(home: dict[str, str]) -> None:
    found = Settings.from_env(home | {"ZLORA_MODELS": "a=owner/model@v1,b=demo"})

    assert (found.model, found.hub_revision) == ("owner/model", "v1")
    assert found.serves_demo_model
    other = found.with_model(found.models[1])
    assert (other.model, other.hub_revision, other.models) == ("demo", None, found.models[1:])


@pytest.mark.parametrize("name", ["ZLORA_MODEL", "ZLORA_MODEL_REVISION"])
def test_one_model_and_several_are_refused(home: dict[str, str], name: str) -> None:
    with pytest.raises(InvalidSetting, match=f"^{name} and ZLORA_MODELS: expected one"):
        Settings.from_env(home | {"ZLORA_MODELS": "a=demo", name: "other"})


def test_the_demo_model_has_a_catalogue_of_its_loras_unless_another_is_set(tmp_path: Path) -> None:
    """Each entry has the checksum of the file that its source names."""
    own = tmp_path / "loras.toml"
    own.write_text("[loras.mine]\nsource = 'owner/mine'\n")
    demo = Settings.from_env({"ZLORA_MODEL": "demo"})
    other = Settings.from_env({"ZLORA_MODEL": "demo", "ZLORA_CATALOGUE": str(own)})

    entries = demo.open_catalogue().entries

    assert list(entries) == sorted(file.stem for file in DEMO_LORAS.glob("*.safetensors"))
    for name, entry in entries.items():
        data = (DEMO_LORAS / f"{name}.safetensors").read_bytes()
        assert entry.source == f"demo://{name}"
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert list(other.open_catalogue().entries) == ["mine"]
    assert not Settings.from_env({}).open_catalogue().entries


def test_a_closed_catalogue_needs_a_file() -> None:
    closed = Settings.from_env({"ZLORA_LORAS": "catalogue"})

    with pytest.raises(InvalidSetting, match="ZLORA_CATALOGUE: expected the file"):
        closed.open_catalogue()
    with pytest.raises(InvalidSetting, match="ZLORA_CATALOGUE='/no/such': expected the path"):
        Settings.from_env({"ZLORA_CATALOGUE": "/no/such"})
