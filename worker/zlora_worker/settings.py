"""The worker's settings: the only reader of the environment. One field a variable, with its default and its meaning."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from zlora import config
from zlora.broker.celery_app import VISIBILITY
from zlora.errors import InvalidSetting
from zlora.lora.addresses import CIVITAI, HUGGING_FACE
from zlora.schema import QUEUE, UrlPolicy

from zlora_worker import setting_types

DEMO_MODEL: Final = Path(__file__).with_name("demo") / "weights" / "model"  # diffusers layout
DEMO_LORAS: Final = Path(__file__).with_name("demo") / "weights" / "loras"  # safetensors files
_SECRET = "secret"  # noqa: S105 - a key of metadata


def _from(
    *names: str,
    default: str = "",
    read: Callable[[str], Any] = str,
    note: str,
    secret: bool = False,
) -> Any:
    """A field read from the first of the variables `names` that is set; `note` is its line in the README's table."""
    return field(
        metadata={"names": names, "default": default, "read": read, "note": note, _SECRET: secret}
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """All of a worker's settings. `repr` shows no secret."""

    home: Path
    broker_url: str
    result_backend: str
    queue: str = _from(config.QUEUE, default=QUEUE, note="Queue to serve; one base model per queue")
    model: str = _from(
        "ZLORA_MODEL",
        default="stabilityai/stable-diffusion-xl-base-1.0",
        note="Base: a hub id, a diffusers folder, a single `.safetensors` file, or `demo`",
    )
    model_config: str = _from(
        "ZLORA_MODEL_CONFIG",
        note="Folder with configuration and tokenizers for a single file; SDXL's are built in",
    )
    vae: str = _from(
        "ZLORA_VAE", note="Another VAE: a hub id or a folder, such as one made for fp16"
    )
    device: str = _from(
        "ZLORA_DEVICE",
        default="auto",
        note="`cuda`, `cuda:1`, `cpu`; `auto` is CUDA where there is a GPU",
    )
    dtype: str = _from(
        "ZLORA_DTYPE",
        default="auto",
        read=setting_types.choice("auto", "float16", "bfloat16", "float32"),
        note="`auto` is `float16` on CUDA and `float32` on a CPU",
    )
    load_timeout: int = _from(
        "ZLORA_LOAD_TIMEOUT",
        default="1800",
        read=setting_types.count,
        note="Seconds that loading the base may take, download included",
    )
    job_timeout: int = _from(
        "ZLORA_JOB_TIMEOUT",
        default="870",
        read=setting_types.count,
        note="Seconds that a job may take, and the most that its `timeout` may ask for",
    )
    hard_grace: int = _from(
        "ZLORA_HARD_GRACE",
        default="30",
        read=setting_types.count,
        note="Seconds after a job's time in which it must have ended; then its child is killed",
    )
    shutdown_timeout: int = _from(
        "ZLORA_SHUTDOWN_TIMEOUT",
        default="0",
        read=setting_types.count_or_none,
        note="Seconds after a SIGTERM until a job is put back; 0 waits for its end",
    )
    visibility: int = _from(
        "ZLORA_VISIBILITY",
        default=str(VISIBILITY),
        read=setting_types.count,
        note="Seconds after a dead worker's last sign until its job goes to another; alike for all workers of a broker",
    )
    sweep: int = _from(
        "ZLORA_SWEEP",
        default="15",
        read=setting_types.count,
        note="Seconds between two looks for jobs whose message is lost",
    )
    probes: str = _from(
        "ZLORA_PROBES",
        note="Folder for the files `ready` and `alive`, one a worker; default: a temporary one",
    )
    metrics: tuple[str, int] | None = _from(
        "ZLORA_METRICS",
        read=setting_types.address,
        note="`host:port` at which Prometheus finds `/metrics`: `0.0.0.0:9808`; default: nowhere",
    )
    log: Literal["auto", "json", "text"] = _from(
        "ZLORA_LOG",
        default="auto",
        read=setting_types.choice("auto", "json", "text"),
        note="Lines of JSON or of text; `auto` is text on a terminal and JSON elsewhere",
    )
    prompts: Literal["shown", "hashed"] = _from(
        config.PROMPTS,
        default="shown",
        read=setting_types.choice("shown", "hashed"),
        note="What Flower and logs have of prompts: their text, or 12 digits by which equal ones are known; "
        "for clients too",
    )
    store: str = _from(
        "ZLORA_STORE",
        read=setting_types.store_url,
        note="`file:///folder` or `s3://bucket/prefix`; default: `store` in the data folder",
    )
    s3_endpoint: str = _from(
        "ZLORA_S3_ENDPOINT",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        read=config.web_url,
        note="S3 server other than AWS, with buckets as paths",
    )
    s3_public_endpoint: str = _from(
        "ZLORA_S3_PUBLIC_ENDPOINT",
        read=setting_types.public_url,
        note="The same server as its users reach it; presigned URLs are for it",
    )
    s3_addressing: Literal["auto", "path", "virtual"] = _from(
        "ZLORA_S3_ADDRESSING",
        default="auto",
        read=setting_types.choice("auto", "path", "virtual"),
        note="Bucket in the path or in the host; `auto`: in the path where `ZLORA_S3_ENDPOINT` is set",
    )
    s3_put: Mapping[str, Any] = _from(
        "ZLORA_S3_PUT",
        read=setting_types.options,
        note='More arguments of each put, as JSON: `{"StorageClass": "STANDARD_IA"}`',
        secret=True,
    )
    urls: tuple[UrlPolicy, ...] = _from(
        "ZLORA_URLS",
        read=setting_types.url_policies,
        note="`presigned`, `public`, `file`, `key`, comma-separated: what requests may ask for, the default first",
    )
    public_url: str = _from(
        "ZLORA_PUBLIC_URL",
        read=setting_types.public_url,
        note="Base of public URLs, in front of prefix and key; makes them the default",
    )
    url_seconds: int = _from(
        "ZLORA_URL_SECONDS",
        default="86400",
        read=setting_types.url_seconds,
        note="Seconds that a presigned URL holds, and the most that a request may ask for",
    )
    inline_bytes: int = _from(
        "ZLORA_INLINE_BYTES",
        default="1000000",
        read=setting_types.count_or_none,
        note="Bytes of all pictures of a job up to which they come inline where a request asks for it",
    )
    lora_cache: str = _from(
        "ZLORA_LORA_CACHE", note="Folder of the LoRA cache; default: `loras` in the data folder"
    )
    lora_cache_bytes: int = _from(
        "ZLORA_LORA_CACHE_BYTES",
        default="20000000000",
        read=setting_types.count,
        note="Bytes that the LoRA cache may hold",
    )
    lora_max_bytes: int = _from(
        "ZLORA_LORA_MAX_BYTES",
        default="2147483648",
        read=setting_types.count,
        note="Bytes that one LoRA may have",
    )
    lora_memory_bytes: int = _from(
        "ZLORA_LORA_MEMORY_BYTES",
        default="4000000000",
        read=setting_types.count,
        note="Bytes of host memory for LoRAs that were read before",
    )
    lora_deadline: int = _from(
        "ZLORA_LORA_DEADLINE",
        default="300",
        read=setting_types.count,
        note="Seconds that one LoRA's download may take",
    )
    lora_free_bytes: int = _from(
        "ZLORA_LORA_FREE_BYTES",
        default="1000000000",
        read=setting_types.count_or_none,
        note="Bytes of the LoRA cache's disk that stay free",
    )
    lora_min_rate: int = _from(
        "ZLORA_LORA_MIN_RATE",
        default="10000",
        read=setting_types.count_or_none,
        note="Bytes a second below which a download is given up",
    )
    look_ahead: int = _from(
        "ZLORA_LOOK_AHEAD",
        default="4",
        read=setting_types.depth,
        note="Jobs next in line whose LoRAs are fetched while another is drawn; 0 fetches none ahead",
    )
    patch: str = _from(
        "ZLORA_PATCH",
        default="auto",
        read=setting_types.choice("auto", "shadow", "inplace"),
        note="Merged weights go to memory of their own, or in place with a copy in host memory; `auto`: by the room",
    )
    base_check: str = _from(
        "ZLORA_BASE_CHECK",
        default="auto",
        read=setting_types.choice("auto", "all"),
        note="How much of the base is compared after each job: what 1 % of its time allows, or all",
    )
    allow_hosts: frozenset[str] = _from(
        config.ALLOW_HOSTS,
        read=config.hosts,
        note="`host` or `host:port`, comma-separated, of LoRAs and of receivers of webhooks: "
        "may be private, speak plain `http` and listen on other ports than 443",
    )
    certificates: str = _from(
        config.CERTIFICATES,
        read=config.existing_file,
        note="File of the certificates to trust for LoRA sources and webhooks; default: certifi's",
    )
    lora_roots: tuple[Path, ...] = _from(
        "ZLORA_LORA_ROOTS",
        read=setting_types.folders,
        note="Folders, comma-separated, whose files `file://` may name",
    )
    lora_buckets: tuple[str, ...] = _from(
        "ZLORA_LORA_S3",
        read=setting_types.buckets,
        note="`bucket` or `bucket/folder`, comma-separated: what `s3://` may name",
    )
    lora_s3_endpoint: str = _from(
        "ZLORA_LORA_S3_ENDPOINT",
        read=config.web_url,
        note="S3 server of `s3://` sources; default: the store's",
    )
    lora_s3_region: str = _from(
        "ZLORA_LORA_S3_REGION", note="Its region; default: boto3's own rules"
    )
    lora_s3_key: str = _from(
        "ZLORA_LORA_S3_ACCESS_KEY_ID",
        note="Credentials for `s3://` sources; default: boto3's own rules",
    )
    lora_s3_secret: str = _from(
        "ZLORA_LORA_S3_SECRET_ACCESS_KEY", note="The key's secret", secret=True
    )
    lora_s3_token: str = _from(
        "ZLORA_LORA_S3_SESSION_TOKEN", note="The token of a temporary key", secret=True
    )
    hf_endpoint: str = _from(
        *config.HUGGING_FACE,
        default=HUGGING_FACE,
        read=config.web_url,
        note="The hub of `hf://`, or a mirror of it",
    )
    hf_token: str = _from(
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        note="Token for that hub, and for nobody else",
        secret=True,
    )
    civitai_url: str = _from(
        config.CIVITAI, default=CIVITAI, read=config.web_url, note="Civitai, or a mirror of it"
    )
    civitai_token: str = _from(
        "CIVITAI_TOKEN",
        "CIVITAI_API_TOKEN",
        note="Token for Civitai, and for nobody else",
        secret=True,
    )
    hub_url: str = _from(
        "FILE_API_BASE_URL",
        "COZY_HUB_URL",
        read=config.web_url,
        note="Base URL of the hub behind `cozy_ref`",
    )
    hub_token: str = _from(
        "FILE_API_TOKEN", "COZY_HUB_TOKEN", note="Bearer token for the hub", secret=True
    )
    hub_tenant: str = _from("COZY_TENANT_ID", note="Tenant sent to the hub")
    webhook_secret: str = _from(
        config.WEBHOOK_SECRET,
        read=setting_types.webhook_secrets,
        note="Secrets, separated by spaces, each of which signs webhooks: `whsec_...`; "
        "default: none, and `zlora up` makes one. How to make one: docs/webhooks.md",
        secret=True,
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read all variables; raises `InvalidSetting` that names the variable."""
        connection = config.Connection.from_env(environ)
        values: dict[str, Any] = {
            "home": config.home(environ),
            "broker_url": connection.broker_url,
            "result_backend": connection.result_backend,
        }
        for item in fields(cls):
            if item.metadata:
                values[item.name] = _read(item.metadata, environ)
        if bool(values["lora_s3_key"]) != bool(values["lora_s3_secret"]):
            name = "ZLORA_LORA_S3_SECRET_ACCESS_KEY"
            raise InvalidSetting(
                f"{name} and ZLORA_LORA_S3_ACCESS_KEY_ID: one without the other", {"name": name}
            )
        return cls(**values)

    @property
    def store_url(self) -> str:
        """The store, with its default."""
        return self.store or (self.home / "store").as_uri()

    @property
    def source_endpoint(self) -> str:
        """The S3 server of `s3://` sources; empty for AWS."""
        return self.lora_s3_endpoint or self.s3_endpoint

    @property
    def cache_folder(self) -> Path:
        """The LoRA cache's folder, with its default."""
        return (
            Path(self.lora_cache).expanduser().absolute()
            if self.lora_cache
            else self.home / "loras"
        )

    @property
    def secrets(self) -> list[str]:
        """All values that must not be read anywhere, such as in a log."""
        values = [getattr(self, item.name) for item in fields(self) if item.metadata.get(_SECRET)]
        words = [word for value in values if isinstance(value, str) for word in value.split()]
        urls = [urlsplit(url) for url in (self.broker_url, self.result_backend)]
        passwords = [url.password or "" for url in urls]
        passwords += [
            value for url in urls for name, value in parse_qsl(url.query) if name == "password"
        ]
        keys = [
            str(value) for name, value in self.s3_put.items() if "Key" in name
        ]  # `SSEKMSKeyId`, and not `ACL`
        return [*words, *passwords, *map(unquote, passwords), *keys]

    def __repr__(self) -> str:
        shown = {
            item.name: _masked(getattr(self, item.name), item.metadata.get(_SECRET))
            for item in fields(self)
        }
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _read(metadata: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
    told = {name: value for name in metadata["names"] if (value := config.value_of(environ, name))}
    name, text = next(iter(told.items()), (metadata["names"][0], metadata["default"]))
    try:
        return metadata["read"](text)
    except ValueError as error:
        shown = "***" if metadata[_SECRET] else repr(_masked(text, None))
        raise InvalidSetting(f"{name}={shown}: {error}", {"name": name}) from None


def _masked(value: Any, secret: bool | None) -> Any:
    if secret and value:
        return "***"
    return re.sub(r"://[^;]*@", "://***@", value) if isinstance(value, str) else value
