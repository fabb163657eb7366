"""Settings of the worker: its only reader of the environment.

Each field has its variables, its default, its parser and its note in the reference.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from zlora import config
from zlora.broker.celery_app import VISIBILITY
from zlora.errors import InvalidSetting
from zlora.lora.addresses import CIVITAI, HUGGING_FACE
from zlora.lora.catalogue import Catalogue
from zlora.schema import QUEUE, UrlPolicy

from zlora_worker import setting_parsers as parsers

_SDXL: Final = "stabilityai/stable-diffusion-xl-base-1.0"
_SDXL_REVISION: Final = "462165984030d82259a11f4367a4eed129e94a7b"  # commit of its repository
DEMO_MODEL: Final = Path(__file__).with_name("demo") / "weights" / "model"  # diffusers layout
DEMO_LORAS: Final = Path(__file__).with_name("demo") / "weights" / "loras"  # safetensors files
DEMO_CATALOGUE: Final = DEMO_LORAS.with_suffix(".toml")


def _variable(
    *names: str,
    default: str = "",
    read: Callable[[str], Any] = str,
    note: str,
    secret: bool = False,
) -> Any:
    """Return a field that is read from the first of the variables `names` that is set."""
    metadata = {"names": names, "default": default, "read": read, "note": note, "secret": secret}
    return field(metadata=metadata)


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """All settings of a worker. `repr` shows no secrets."""

    home: Path
    broker_url: str
    result_backend: str
    queue: str = _variable(
        config.QUEUE,
        default=QUEUE,
        note="Queue that this worker serves. All workers of a queue have the same base models.",
    )
    model: str = _variable(
        "ZLORA_MODEL",
        default=_SDXL,
        note="Base model: a Hugging Face id, a folder in diffusers layout, a single `.safetensors` "
        "file, or `demo` for the built-in demo model.",
    )
    model_revision: str = _variable(
        "ZLORA_MODEL_REVISION",
        note="Commit, branch or tag of a base model on Hugging Face. With a commit, no other one "
        f"is loaded. Default: the commit `{_SDXL_REVISION}` of SDXL 1.0, `main` of other models.",
    )
    models: tuple[parsers.NamedModel, ...] = _variable(
        "ZLORA_MODELS",
        read=parsers.named_models,
        note="Base models of one family that requests may name in `model`, the default first, as "
        "`name=model` separated by commas, instead of `ZLORA_MODEL`. A model is what "
        "`ZLORA_MODEL` may be; a Hugging Face id may have `@` and a revision. See docs/models.md.",
    )
    models_bytes: int = _variable(
        "ZLORA_MODELS_BYTES",
        default="16000000000",
        read=parsers.non_negative,
        note="Bytes of host memory for copies of the models of `ZLORA_MODELS`. The default holds "
        "two SDXL models in `float16`. What does not fit is loaded from disk when a job names it.",
    )
    model_config: str = _variable(
        "ZLORA_MODEL_CONFIG",
        note="Folder with configuration and tokenizers for a base model in a single file. "
        "Default: built-in files for SDXL and SD 1.5. A file of SD 2.x needs one. "
        "A file of Z-Image needs the folder of a whole model.",
    )
    vae: str = _variable(
        "ZLORA_VAE",
        note="Another VAE for the base model: a Hugging Face id or a folder, for example a VAE "
        "made for float16. Default: the base model's own.",
    )
    device: str = _variable(
        "ZLORA_DEVICE",
        default="auto",
        note="Device of the model: `cuda`, `cuda:1` or `cpu`. `auto` is CUDA if there is a GPU, "
        "else the CPU.",
    )
    dtype: str = _variable(
        "ZLORA_DTYPE",
        default="auto",
        read=parsers.one_of("auto", "float16", "bfloat16", "float32"),
        note="Data type of the weights: `float16`, `bfloat16` or `float32`. `auto` is `float16` on "
        "CUDA and `float32` on a CPU.",
    )
    load_timeout: int = _variable(
        "ZLORA_LOAD_TIMEOUT",
        default="1800",
        read=parsers.positive,
        note="Seconds that loading the base model may take, including its download.",
    )
    job_timeout: int = _variable(
        "ZLORA_JOB_TIMEOUT",
        default="870",
        read=parsers.positive,
        note="Seconds that a job may take; also the largest `timeout` that a request may have.",
    )
    max_attempts: int = _variable(
        "ZLORA_MAX_ATTEMPTS",
        default="3",
        read=parsers.positive,
        note="Child processes that a job may end, by a crash or a signal for instance, until it "
        "fails as `poisoned`.",
    )
    max_losses: int = _variable(
        "ZLORA_MAX_LOSSES",
        default="10",
        read=parsers.positive,
        note="Workers that may be lost while they have a job, as with a machine that is switched "
        "off, until the job fails as `poisoned`.",
    )
    hard_grace: int = _variable(
        "ZLORA_HARD_GRACE",
        default="30",
        read=parsers.positive,
        note="Seconds that a job has to stop after its timeout; then its child process is killed.",
    )
    shutdown_timeout: int = _variable(
        "ZLORA_SHUTDOWN_TIMEOUT",
        default="0",
        read=parsers.non_negative,
        note="Seconds after SIGTERM until the running job is put back into the queue. 0 waits "
        "until the job has ended.",
    )
    visibility: int = _variable(
        "ZLORA_VISIBILITY",
        default=str(VISIBILITY),
        read=parsers.positive,
        note="Seconds after the last heartbeat of a killed worker until another one gets its job. "
        "Must be the same for all workers of a Redis database.",
    )
    sweep: int = _variable(
        "ZLORA_SWEEP",
        default="15",
        read=parsers.positive,
        note="Seconds between two searches for jobs whose message is lost.",
    )
    sidecar_timeout: int = _variable(
        "ZLORA_SIDECAR_TIMEOUT",
        default="60",
        read=parsers.positive,
        note="Seconds without a sign of life after which the sidecar is replaced.",
    )
    probes: str = _variable(
        "ZLORA_PROBES",
        note="Folder for the probe files `ready` and `alive`; each worker needs its own. "
        "Default: a temporary folder.",
    )
    metrics: tuple[str, int] | None = _variable(
        "ZLORA_METRICS",
        read=parsers.host_and_port,
        note="`host:port` at which the worker serves Prometheus metrics under `/metrics`, for "
        "example `0.0.0.0:9808`. Default: metrics are off.",
    )
    log: Literal["auto", "json", "text"] = _variable(
        "ZLORA_LOG",
        default="auto",
        read=parsers.one_of("auto", "json", "text"),
        note="Format of log lines: `json` or `text`. `auto` is text on a terminal and JSON "
        "elsewhere.",
    )
    prompts: Literal["shown", "hashed"] = _variable(
        config.PROMPTS,
        default="shown",
        read=parsers.one_of("shown", "hashed"),
        note="Prompts in Flower and in logs, for workers and clients: `shown` is their text, "
        "`hashed` is 12 hexadecimal digits that are equal for equal prompts.",
    )
    store: str = _variable(
        "ZLORA_STORE",
        read=parsers.store_url,
        note="Store of the results: `file:///folder` or `s3://bucket/prefix`. "
        "Default: `store` in the data folder.",
    )
    s3_endpoint: str = _variable(
        "ZLORA_S3_ENDPOINT",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        read=config.web_url,
        note="URL of an S3 server other than AWS. Default: AWS.",
    )
    s3_public_endpoint: str = _variable(
        "ZLORA_S3_PUBLIC_ENDPOINT",
        read=parsers.public_url,
        note="URL of the same S3 server as its users reach it; presigned URLs contain it. "
        "Default: `ZLORA_S3_ENDPOINT`.",
    )
    s3_addressing: Literal["auto", "path", "virtual"] = _variable(
        "ZLORA_S3_ADDRESSING",
        default="auto",
        read=parsers.one_of("auto", "path", "virtual"),
        note="Place of the bucket in S3 URLs: `path` or `virtual` (in the host name). `auto` is "
        "`path` if `ZLORA_S3_ENDPOINT` is set, else `virtual`.",
    )
    s3_put: Mapping[str, Any] = _variable(
        "ZLORA_S3_PUT",
        read=parsers.json_object,
        note="Additional arguments of each S3 put, as a JSON object, for example "
        '`{"StorageClass": "STANDARD_IA"}`.',
        secret=True,
    )
    urls: tuple[UrlPolicy, ...] = _variable(
        "ZLORA_URLS",
        read=parsers.url_policies,
        note="URL policies that requests may choose, separated by commas, the default first: "
        "`presigned`, `public`, `file`, `key`. Default: `public` if `ZLORA_PUBLIC_URL` is set, "
        "else the store's own: `presigned` for S3, `file` for a folder.",
    )
    public_url: str = _variable(
        "ZLORA_PUBLIC_URL",
        read=parsers.public_url,
        note="Base of public URLs, to which prefix and key are appended. If it is set, `public` is "
        "the default URL policy.",
    )
    url_seconds: int = _variable(
        "ZLORA_URL_SECONDS",
        default="86400",
        read=parsers.url_seconds,
        note="Seconds until a presigned URL expires, at most 604800 (7 days); also the largest "
        "`url_expires_in` that a request may have.",
    )
    inline_bytes: int = _variable(
        "ZLORA_INLINE_BYTES",
        default="1000000",
        read=parsers.non_negative,
        note="Bytes of all images of a job up to which a request with `inline` gets them as data "
        "URIs.",
    )
    catalogue: str = _variable(
        config.CATALOGUE,
        read=config.existing_file,
        note="TOML file with names of LoRAs, their sources and weights: see docs/catalogue.md. "
        "Default: none; with the demo model, a catalogue of its LoRAs.",
    )
    loras: Literal["any", "catalogue"] = _variable(
        "ZLORA_LORAS",
        default="any",
        read=parsers.one_of("any", "catalogue"),
        note="LoRAs that requests may use: `any` is the catalogue and every address that the other "
        "settings allow, `catalogue` is the catalogue only.",
    )
    lora_cache: str = _variable(
        "ZLORA_LORA_CACHE",
        note="Folder of the LoRA cache on disk. Default: `loras` in the data folder.",
    )
    lora_cache_bytes: int = _variable(
        "ZLORA_LORA_CACHE_BYTES",
        default="20000000000",
        read=parsers.positive,
        note="Bytes that the LoRA cache on disk may hold.",
    )
    lora_max_bytes: int = _variable(
        "ZLORA_LORA_MAX_BYTES",
        default="2147483648",
        read=parsers.positive,
        note="Bytes that one LoRA file may have.",
    )
    image_max_bytes: int = _variable(
        "ZLORA_IMAGE_MAX_BYTES",
        default="67108864",
        read=parsers.positive,
        note="Bytes that the file of an image or a mask to start from may have.",
    )
    image_max_pixels: int = _variable(
        "ZLORA_IMAGE_MAX_PIXELS",
        default="33554432",
        read=parsers.positive,
        note="Pixels that an image or a mask to start from may have, before it gets the size of "
        "the job. A pixel takes up to 20 bytes of memory while it is decoded.",
    )
    lora_memory_bytes: int = _variable(
        "ZLORA_LORA_MEMORY_BYTES",
        default="4000000000",
        read=parsers.positive,
        note="Bytes of host memory for LoRAs that stay loaded between jobs. A LoRA takes as much "
        "as its file, in pinned memory if the model is on a GPU.",
    )
    spool: str = _variable(
        "ZLORA_SPOOL",
        note="Folder in memory for drawn images until the sidecar has stored them. Default: "
        "`/dev/shm`, or the folder for temporary files if that cannot be used.",
    )
    spool_bytes: int = _variable(
        "ZLORA_SPOOL_BYTES",
        default="256000000",
        read=parsers.positive,
        note="Bytes of drawn images in that folder. Further images of a job are in the folder "
        "`spool` in `ZLORA_HOME`, and the next job waits.",
    )
    lora_deadline: int = _variable(
        "ZLORA_LORA_DEADLINE",
        default="300",
        read=parsers.positive,
        note="Seconds that the download of one LoRA may take.",
    )
    lora_free_bytes: int = _variable(
        "ZLORA_LORA_FREE_BYTES",
        default="1000000000",
        read=parsers.non_negative,
        note="Bytes that stay free on the disk of the LoRA cache.",
    )
    lora_min_rate: int = _variable(
        "ZLORA_LORA_MIN_RATE",
        default="10000",
        read=parsers.non_negative,
        note="Bytes per second below which a download is abandoned. 0 allows any rate.",
    )
    look_ahead: int = _variable(
        "ZLORA_LOOK_AHEAD",
        default="4",
        read=parsers.look_ahead,
        note="Number of waiting jobs, 0 to 64, whose LoRAs are prefetched while another job runs; "
        "those of the next two are also parsed. 0 turns both off.",
    )
    patch: str = _variable(
        "ZLORA_PATCH",
        default="auto",
        read=parsers.one_of("auto", "shadow", "inplace"),
        note="Place of merged weights: `shadow` is a second copy on the device, `inplace` replaces "
        "the base model's weights, with a copy of them in host memory. `auto` chooses by free "
        "memory.",
    )
    compile: Literal["off", "blocks", "graphs"] = _variable(
        "ZLORA_COMPILE",
        default="off",
        read=parsers.one_of("off", "blocks", "graphs"),
        note="Compilation of the denoiser by PyTorch at the start; needs a C compiler. `blocks` "
        "compiles its transformer blocks, `graphs` also records them as CUDA graphs and merges "
        "LoRAs in place. Last bits of images differ. See docs/operations.md.",
    )
    base_check: str = _variable(
        "ZLORA_BASE_CHECK",
        default="auto",
        read=parsers.one_of("auto", "all"),
        note="Share of the base model that is compared with its checksum after each job: `auto` is "
        "what fits into 1 % of the job's time, `all` is everything.",
    )
    allow_hosts: frozenset[str] = _variable(
        config.ALLOW_HOSTS,
        read=config.hosts,
        note="Hosts of LoRAs and webhooks, as `host` (ports 80 and 443) or `host:port`, separated "
        "by commas, that may have private addresses and use plain `http`. Default: none.",
    )
    certificates: str = _variable(
        config.CERTIFICATES,
        read=config.existing_file,
        note="File with the CA certificates to trust for LoRA sources and webhooks. "
        "Default: those of the Python package certifi.",
    )
    lora_roots: tuple[Path, ...] = _variable(
        "ZLORA_LORA_ROOTS",
        read=parsers.folders,
        note="Folders, as absolute paths separated by commas, whose files `file://` addresses may "
        "name. Default: none.",
    )
    lora_buckets: tuple[str, ...] = _variable(
        "ZLORA_LORA_S3",
        read=parsers.buckets,
        note="S3 buckets or folders in them that `s3://` addresses may name, as `bucket` or "
        "`bucket/folder` separated by commas. Default: none.",
    )
    lora_s3_endpoint: str = _variable(
        "ZLORA_LORA_S3_ENDPOINT",
        read=config.web_url,
        note="URL of the S3 server of `s3://` LoRAs. Default: `ZLORA_S3_ENDPOINT`.",
    )
    lora_s3_region: str = _variable(
        "ZLORA_LORA_S3_REGION",
        note="Region of the S3 server of `s3://` LoRAs. Default: boto3's own configuration.",
    )
    lora_s3_key: str = _variable(
        "ZLORA_LORA_S3_ACCESS_KEY_ID",
        note="Access key id for `s3://` LoRAs, together with `ZLORA_LORA_S3_SECRET_ACCESS_KEY`. "
        "Default: boto3's own configuration.",
    )
    lora_s3_secret: str = _variable(
        "ZLORA_LORA_S3_SECRET_ACCESS_KEY",
        note="Secret access key for `s3://` LoRAs, together with `ZLORA_LORA_S3_ACCESS_KEY_ID`.",
        secret=True,
    )
    lora_s3_token: str = _variable(
        "ZLORA_LORA_S3_SESSION_TOKEN",
        note="Session token for `s3://` LoRAs, if the access key is a temporary one.",
        secret=True,
    )
    hf_endpoint: str = _variable(
        *config.HUGGING_FACE,
        default=HUGGING_FACE,
        read=config.web_url,
        note="URL of Hugging Face, or of a mirror, for `hf://` addresses.",
    )
    hf_token: str = _variable(
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        note="Token for Hugging Face; it is sent to `ZLORA_HF_ENDPOINT` only.",
        secret=True,
    )
    civitai_url: str = _variable(
        config.CIVITAI,
        default=CIVITAI,
        read=config.web_url,
        note="URL of Civitai, or of a mirror, for `civitai://` addresses.",
    )
    civitai_token: str = _variable(
        "CIVITAI_TOKEN",
        "CIVITAI_API_TOKEN",
        note="Token for Civitai; it is sent to `ZLORA_CIVITAI_URL` only.",
        secret=True,
    )
    hub_url: str = _variable(
        "FILE_API_BASE_URL",
        "COZY_HUB_URL",
        read=config.web_url,
        note="Base URL of the Cozy hub for `cozy_ref`. Default: none, and `cozy_ref` is refused.",
    )
    hub_token: str = _variable(
        "FILE_API_TOKEN",
        "COZY_HUB_TOKEN",
        note="Bearer token for the Cozy hub.",
        secret=True,
    )
    hub_tenant: str = _variable(
        "COZY_TENANT_ID", note="Tenant id that is sent to the Cozy hub. Default: none."
    )
    webhook_secret: str = _variable(
        config.WEBHOOK_SECRET,
        read=parsers.webhook_secrets,
        note="Secrets (`whsec_...`), separated by spaces, each of which signs every webhook. "
        "Default: none; `zlora up` creates one. See docs/webhooks.md.",
        secret=True,
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read all variables. Raises `InvalidSetting` that names the variable."""
        connection = config.Connection.from_env(environ)
        values: dict[str, Any] = {
            "home": config.home(environ),
            "broker_url": connection.broker_url,
            "result_backend": connection.result_backend,
        }
        for item in fields(cls):
            if item.metadata:
                values[item.name] = _read(item.metadata, environ)
        if values["models"]:
            for name in ("ZLORA_MODEL", "ZLORA_MODEL_REVISION"):
                if config.value_of(environ, name):
                    raise InvalidSetting(
                        f"{name} and ZLORA_MODELS: expected one of both; a revision follows a "
                        "model in ZLORA_MODELS after @",
                        {"name": name},
                    )
            first = values["models"][0]
            values |= {"model": first.model, "model_revision": first.revision}
        if bool(values["lora_s3_key"]) != bool(values["lora_s3_secret"]):
            name = "ZLORA_LORA_S3_SECRET_ACCESS_KEY"
            raise InvalidSetting(
                f"{name} and ZLORA_LORA_S3_ACCESS_KEY_ID: expected both or neither", {"name": name}
            )
        if values["compile"] == "graphs" and values["patch"] == "shadow":
            name = "ZLORA_PATCH"
            raise InvalidSetting(
                f"{name}=shadow and ZLORA_COMPILE=graphs: CUDA graphs need weights that stay where "
                "they are, expected inplace or auto",
                {"name": name},
            )
        return cls(**values)

    @property
    def store_url(self) -> str:
        """URL of the store, or its default."""
        return self.store or (self.home / "store").as_uri()

    @property
    def source_endpoint(self) -> str:
        """URL of the S3 server of `s3://` LoRAs; empty for AWS."""
        return self.lora_s3_endpoint or self.s3_endpoint

    @property
    def cache_folder(self) -> Path:
        """Folder of the LoRA cache, or its default."""
        if self.lora_cache:
            return Path(self.lora_cache).expanduser().absolute()
        return self.home / "loras"

    def with_model(self, chosen: parsers.NamedModel) -> Self:
        """Return the settings of a worker that has only this one of the `models`."""
        return replace(self, models=(chosen,), model=chosen.model, model_revision=chosen.revision)

    @property
    def serves_demo_model(self) -> bool:
        """Whether a base model is the demo model, which alone fits `demo://` LoRAs."""
        return "demo" in (self.model, *(each.model for each in self.models))

    @property
    def catalogue_file(self) -> Path | None:
        """File of the catalogue; None if there is none."""
        if self.catalogue:
            return Path(self.catalogue)
        return DEMO_CATALOGUE if self.serves_demo_model else None

    def open_catalogue(self) -> Catalogue:
        """Read the catalogue, which is empty without a file; raise `InvalidSetting`."""
        name, only = config.CATALOGUE, self.loras == "catalogue"
        if (file := self.catalogue_file) is not None:
            return Catalogue.load(file, only=only, variable=name)
        if only:
            raise InvalidSetting(
                f"{name}: expected the file of a catalogue with ZLORA_LORAS=catalogue",
                {"name": name},
            )
        return Catalogue()

    @property
    def hub_revision(self) -> str | None:
        """Revision of a base model on Hugging Face; None for the hub's default."""
        if not self.model_revision and self.model == _SDXL:
            return _SDXL_REVISION
        return self.model_revision or None

    @property
    def credentials_fingerprint(self) -> str:
        """Sha256 of all settings that decide what LoRA sources let this worker have."""
        deciding = (
            (self.hub_url, self.hub_token, self.hub_tenant),
            (self.hf_endpoint, self.hf_token),
            (self.civitai_url, self.civitai_token),
            (self.source_endpoint, self.lora_s3_key, self.lora_s3_secret, self.lora_s3_token),
            (self.lora_buckets, self.lora_roots, sorted(self.allow_hosts)),
            self.serves_demo_model,
        )
        return hashlib.sha256(repr(deciding).encode()).hexdigest()

    @property
    def secrets(self) -> list[str]:
        """All values that must not be shown anywhere, such as in a log."""
        secrets = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata.get("secret") and isinstance(value, str):
                secrets += value.split()
        for url in map(urlsplit, (self.broker_url, self.result_backend)):
            passwords = [url.password or ""]
            passwords += [
                value
                for name, value in parse_qsl(url.query)
                if name in ("password", "sentinel_password")
            ]
            secrets += [*passwords, *map(unquote, passwords)]
        # `SSEKMSKeyId` for example, and not `ACL`
        secrets += [str(value) for name, value in self.s3_put.items() if "Key" in name]
        return secrets

    def __repr__(self) -> str:
        shown = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata.get("secret") and value:
                value = "***"
            elif isinstance(value, str):
                value = _without_password(value)
            shown.append(f"{item.name}={value!r}")
        return f"Settings({', '.join(shown)})"


def reference() -> Iterator[config.SettingRow]:
    """Rows of the reference page, in the order of the fields."""
    yield config.SettingRow(
        (config.BROKER_URL,),
        config.DEFAULT_BROKER,
        "URL of the Redis broker, for clients and workers; for TLS and Sentinels see "
        "docs/operations.md. If it is not set, a running `zlora up` is used before the default.",
    )
    yield config.SettingRow(
        (config.RESULT_BACKEND,),
        "",
        "URL of the Redis result backend, for clients and workers. Default: the broker.",
    )
    yield config.SettingRow(
        (config.HOME,),
        "",
        "Data folder, for clients and workers. Default: `zlora` in the user's data folder (XDG), "
        "usually `~/.local/share/zlora`.",
    )
    for item in fields(Settings):
        if item.metadata:
            names, default = item.metadata["names"], item.metadata["default"]
            yield config.SettingRow(names, default, item.metadata["note"])


def _read(metadata: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
    name, text = metadata["names"][0], metadata["default"]
    # every variable is read, so that an unreadable file of any of them is an error
    values = [(other, config.value_of(environ, other)) for other in metadata["names"]]
    for other, value in reversed(values):
        if value:
            name, text = other, value
    try:
        return metadata["read"](text)
    except ValueError as error:
        shown = "***" if metadata["secret"] else repr(_without_password(text))
        raise InvalidSetting(f"{name}={shown}: {error}", {"name": name}) from None


def _without_password(text: str) -> str:
    return re.sub(r"password=[^&;]*", "password=***", re.sub(r"://[^;]*@", "://***@", text))
