"""Preflight over real sockets: descriptions, how little is read, and jobs that are not queued."""

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import torch
import zlora.lora.preflight
from click.testing import CliRunner
from safetensors.torch import save
from support.fakes import Tensors, kohya_lora
from support.servers import (
    Answer,
    Host,
    Request,
    lora_bytes,
    open_files,
    reply,
    serving,
    tensor_file,
    watched_connections,
)
from zlora import Client, LoraInfo, Preflight
from zlora.broker.keys import waiting_lists
from zlora.cli import main
from zlora.errors import (
    EmbeddingMismatch,
    InvalidRequest,
    InvalidSetting,
    LoraError,
    LoraForbidden,
    LoraMismatch,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
    NotSafetensors,
)
from zlora.lora.addresses import MAX_LISTING
from zlora.lora.safetensors_header import MAX_HEADER
from zlora.schema import Asset, EmbeddingSpec, GenerateRequest, LoraSpec, parse_request

SECRETS: Final = ("s3cret", "us3r", "pa55", "fr4g")
QUERY: Final = "?sig=s3cret#fr4g"
SDXL: Final = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
COMMIT: Final = "c0ffee" + "0" * 34
PAGE: Final = (
    b"<!DOCTYPE html><html><body>Sign in to see this model, and all the others.</body></html>"
)


def lora(
    module: str = SDXL, *, width: int = 2048, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return a LoRA of one module that reads `width` numbers, as kohya names it."""
    tensors = {
        f"{module}.lora_down.weight": torch.ones(4, width),
        f"{module}.lora_up.weight": torch.ones(8, 4),
        f"{module}.alpha": torch.tensor(1.0),
    }
    return saved(tensors, metadata)


def saved(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    return save(tensors, metadata=dict(metadata or {}))


def ranged(body: bytes, *, most: int = 2**40) -> Callable[[Request], bytes]:
    """Return a server that supports ranges, of at most `most` bytes each."""

    def answer(request: Request) -> bytes:
        first, last = (
            int(text) for text in request.headers["range"].removeprefix("bytes=").split("-")
        )
        if first >= len(body):
            return reply(status=416, Content_Range=f"bytes */{len(body)}")
        piece = body[first : min(last + 1, first + most)]
        return reply(
            piece, status=206, Content_Range=f"bytes {first}-{first + len(piece) - 1}/{len(body)}"
        )

    return answer


def preflight(*hosts: Host, **sites: str) -> Preflight:
    return Preflight([host.name for host in hosts], **sites)


def inspected(answer: Answer | bytes) -> LoraInfo:
    with serving(answer) as host:
        return preflight(host).inspect(f"{host.url}/a.safetensors{QUERY}")


def said_by(error: LoraError) -> str:
    """Return an error's message, which is one line without secrets."""
    said = f"{error} {error.details} {error!r}"
    assert not [secret for secret in SECRETS if secret in said]
    assert str(error).isprintable()
    return str(error)


def failure(checks: Preflight, address: str) -> LoraError:
    with pytest.raises(LoraError) as raised:
        checks.inspect(address)
    said_by(raised.value)
    return raised.value


def failure_of(answer: Answer | bytes) -> LoraError:
    with serving(answer) as host:
        return failure(preflight(host), f"{host.url}/a.safetensors{QUERY}")


def request_for(*addresses: str) -> GenerateRequest:
    return GenerateRequest(
        prompt="a city", loras=tuple(LoraSpec(file=Asset(url=address)) for address in addresses)
    )


# --- descriptions


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_inspect_describes_a_lora_by_its_header(knows_ranges: bool) -> None:
    """With and without support of ranges by the server."""
    tensors = kohya_lora() | {
        "lora_te1_a.hada_w1_b": torch.ones(6, 4),
        "lora_te1_a.dora_scale": torch.ones(4),
        f"{SDXL}.lora_down.weight": torch.ones(8, 2048),
    }
    body = saved(tensors, {"modelspec.trigger_phrase": "ohwx woman, red hair"})

    with serving(ranged(body) if knows_ranges else reply(body)) as host:
        info = preflight(host).inspect(Asset(url=f"{host.url}/a%20b{QUERY}"))

    assert info == LoraInfo(
        source=f"{host.url}/a%20b",
        size=len(body),
        format="kohya",
        kinds=("dora-loha", "lora"),
        ranks=(2, 6, 8),
        base="SDXL",
        trigger_words=("ohwx woman", "red hair"),
        modules={"unet": 3, "text_encoder": 1},
    )
    assert host.requests[0].headers["range"] == "bytes=0-262143"
    assert host.requests[0].headers["accept-encoding"] == "identity"


# --- how little is read


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_command_describes_a_file_on_this_machine(tmp_path: Path, scheme: str) -> None:
    file = tmp_path / "a LoRA.safetensors"
    file.write_bytes(save(kohya_lora()))

    address = file.as_uri() if scheme else str(file)
    found = CliRunner().invoke(main, ["inspect", address, "--json"])
    file.write_text("<html>")
    refused = CliRunner().invoke(main, ["inspect", address])

    document = json.loads(found.stdout)
    assert (document["source"], document["format"]) == (str(file), "kohya")
    assert f"{file}: " in refused.stderr
    assert "[not_safetensors]" in refused.stderr


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_only_the_beginning_of_a_large_file_is_read(knows_ranges: bool) -> None:
    body = lora_bytes(size=50_000_000)

    def pieces(_: Request) -> Iterator[bytes]:
        yield reply(length=len(body))
        for first in range(0, len(body), 2**16):
            yield body[first : first + 2**16]

    with serving(ranged(body) if knows_ranges else pieces) as host:
        assert preflight(host).inspect(f"{host.url}/a").size == len(body)

    assert host.sent < 10_000_000  # what the sockets' own buffers took


LONG: Final = lora(metadata={"filler": "x" * 600_000})


@pytest.mark.parametrize("most", [2**40, 250_000])
def test_a_long_header_takes_further_ranges(most: int) -> None:
    with serving(ranged(LONG, most=most)) as host:
        assert preflight(host).inspect(f"{host.url}/a").size == len(LONG)

    firsts = [
        int(request.headers["range"].removeprefix("bytes=").split("-")[0])
        for request in host.requests
    ]
    assert firsts == ([0, 2**18] if most > len(LONG) else [0, 250_000, 500_000])


def test_a_long_header_without_ranges_takes_one_request() -> None:
    with serving(reply(LONG)) as host:
        assert preflight(host).inspect(f"{host.url}/a").size == len(LONG)

    assert len(host.requests) == 1


@pytest.mark.parametrize("most", [1, 10_000])
def test_a_server_of_tiny_ranges_is_given_up_after_eight(most: int) -> None:
    """And no request leaks a descriptor."""
    seen: list[int] = []

    def answer(request: Request) -> bytes:
        seen.append(open_files())
        return ranged(LONG, most=most)(request)

    error = failure_of(answer)

    assert (type(error), error.retryable) == (LoraUnreachable, True)
    assert 1 < len(seen) <= 8
    assert seen[-1] - seen[0] <= 2  # the server's own end of one or the other


def test_a_header_that_is_too_long_is_refused_by_its_length() -> None:
    body = (MAX_HEADER + 1).to_bytes(8, "little") + b"{" + b" " * 1_000_000
    with serving(ranged(body)) as host:
        assert type(failure(preflight(host), f"{host.url}/a")) is NotSafetensors

    assert len(host.requests) == 1


# --- files that are not LoRAs


POINTER: Final = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 228456\n"
)


@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (PAGE, "a web page"),
        (b"\x80\x02}q\x00." + bytes(200), "a pickle"),
        (POINTER, "git-lfs pointer"),
        (lora()[:-1], "damaged"),
        (lora()[:100], "not a safetensors file"),
        (lora() + b"\0", "damaged"),
        (b"", "too few"),
        (tensor_file(b"{broken"), "not the expected JSON"),
    ],
)
def test_another_kind_of_file_is_named(body: bytes, words: str, knows_ranges: bool) -> None:
    error = failure_of(ranged(body) if knows_ranges else reply(body))

    assert type(error) is NotSafetensors
    assert words in str(error)
    assert "/a.safetensors: " in str(error)


def test_a_page_in_the_second_range_is_no_header() -> None:
    """As if a link expired between two requests."""
    first = LONG[: 2**18]

    def answer(request: Request) -> bytes:
        if "bytes=0-" in request.headers["range"]:
            return reply(first, status=206, Content_Range=f"bytes 0-{len(first) - 1}/{len(LONG)}")
        return reply(PAGE)

    assert type(failure_of(answer)) is LoraUnreachable


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"lora_unet_{index}.lora_down.weight" for index in range(20_001)], "20001 tensors"),
        (["unet." + "a." * 200 + "lora_down.weight"], "a name of 421 characters"),
    ],
    ids=["many", "long"],
)
def test_more_or_longer_names_than_any_lora_has_are_a_mismatch(
    names: list[str], words: str
) -> None:
    """They are searched for the words of many formats: 15 MB of names would take 20 s."""
    entry = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}

    assert words in str(failure_of(ranged(tensor_file(dict.fromkeys(names, entry)))))


@pytest.mark.parametrize(
    "tensors", [{"model.weight": torch.ones(2)}, {f"{SDXL}.oft_blocks": torch.ones(2)}]
)
def test_a_valid_file_that_no_worker_reads_is_a_mismatch(tensors: Tensors) -> None:
    assert type(failure_of(ranged(saved(tensors)))) is LoraMismatch


# --- answers


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (reply(status=404), LoraNotFound),
        (reply(status=410), LoraNotFound),
        (reply(status=401), LoraForbidden),
        (reply(status=403), LoraForbidden),
        (reply(status=400), LoraForbidden),
        (reply(status=429, Retry_After="60"), LoraUnreachable),
        (reply(status=206, Content_Range="bytes 5-9/10", body=b"12345"), LoraUnreachable),
        (reply(status=206, Content_Range="bytes 0-9/20"), LoraUnreachable),
        (reply(b"12345", status=206), LoraUnreachable),
        (reply(lora(), Content_Encoding="gzip"), LoraUnreachable),
        (reply(status=302, Location="https://127.0.0.1/x?sig=s3cret"), LoraNotAllowed),
        (reply(status=302, Location="file:///etc/passwd"), LoraNotAllowed),
    ],
)
def test_each_answer_raises_the_error_that_a_worker_raises(
    answer: bytes, kind: type[LoraError]
) -> None:
    assert type(failure_of(answer)) is kind


def test_a_transfer_that_breaks_off_is_retried() -> None:
    answers = iter([reply(lora()[:50], length=500), reply(lora())])

    assert inspected(lambda _: next(answers)).base == "SDXL"


def test_a_dripping_server_meets_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlora.lora.preflight, "_SECONDS", 0.5)

    def drip(_: Request) -> Iterator[bytes]:
        yield reply(length=10_000)
        while True:
            yield b"\1"
            time.sleep(0.02)

    assert "0.5 s" in str(failure_of(drip))


def test_a_login_page_is_forbidden() -> None:
    def answer(request: Request) -> bytes:
        if request.target.startswith("/login"):
            return reply(PAGE)
        return reply(status=307, Location="/login?reason=download-auth")

    error = failure_of(answer)

    assert (type(error), error.details["status"]) == (LoraForbidden, 401)


# --- addresses


@pytest.mark.parametrize(
    "address",
    [
        "s3://b/a",
        "cozy://a/b",
        "file:///a",
        "demo://anime-style",
        "ftp://h/a",
        "owner/repo",
        "",
        "https://[",
        "https://h/a\nb",
        "data:,a",
    ],
)
def test_other_addresses_are_refused_without_a_connection(address: str) -> None:
    with watched_connections() as connections:
        assert (
            type(failure(preflight(), f"{address}{QUERY if '://' in address else ''}"))
            is LoraNotAllowed
        )

    assert connections == []


@pytest.mark.parametrize(
    "name", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "2130706433", "localhost"]
)
def test_a_private_address_is_refused_without_a_connection(name: str) -> None:
    with watched_connections() as connections:
        assert type(failure(preflight(), f"https://us3r:pa55@{name}/a{QUERY}")) is LoraNotAllowed

    assert connections == []


def test_a_redirect_to_a_private_address_is_refused_without_a_connection() -> None:
    with (
        serving(reply(lora())) as inside,
        serving(reply(status=302, Location=f"{inside.url}/a")) as outside,
    ):
        assert type(failure(preflight(outside), f"{outside.url}/a")) is LoraNotAllowed

    assert inside.connections == 0


def test_a_redirect_to_another_allowed_host_is_followed() -> None:
    with (
        serving(reply(lora())) as storage,
        serving(reply(status=302, Location=f"{storage.url}/b")) as host,
    ):
        assert preflight(host, storage).inspect(f"{host.url}/a").base == "SDXL"


def hub(*files: str, body: bytes = b"") -> Answer:
    """Return a hub whose repository `me/mine` has these files."""

    def answer(request: Request) -> bytes:
        if request.target.startswith("/api/models/me/mine/revision/"):
            siblings = [{"rfilename": name} for name in files]
            return reply(json.dumps({"sha": COMMIT, "siblings": siblings}).encode())
        return (
            ranged(body)(request) if request.target.endswith(".safetensors") else reply(status=404)
        )

    return answer


@pytest.mark.parametrize("spelling", ["hf://me/mine", "hf://me/mine@main", "{host}/me/mine"])
def test_a_repository_with_one_lora_stands_for_it(spelling: str) -> None:
    """At the listed commit; the operator's own hub may be private."""
    with serving(hub("README.md", "a b.safetensors", body=lora())) as host:
        info = preflight(hub=host.url).inspect(spelling.format(host=host.url))

    assert info.base == "SDXL"
    assert host.asked == [
        "GET /api/models/me/mine/revision/main",
        f"GET /me/mine/resolve/{COMMIT}/a%20b.safetensors",
    ]


def test_a_file_of_a_repository_is_read_without_a_listing() -> None:
    with serving(hub(body=lora())) as host:
        preflight(hub=host.url).inspect("hf://me/mine/loras/a.safetensors@v1")

    assert host.asked == ["GET /me/mine/resolve/v1/loras/a.safetensors"]


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (("a.safetensors", "b.safetensors"), LoraNotFound),
        (("a.ckpt", "README.md"), NotSafetensors),
        ((), NotSafetensors),
        (("x" * MAX_LISTING,), LoraTooLarge),
    ],
    ids=["two", "none", "empty", "huge"],
)
def test_a_repository_without_exactly_one_lora_is_refused(
    files: tuple[str, ...], kind: type[LoraError]
) -> None:
    with serving(hub(*files)) as host:
        assert type(failure(preflight(hub=host.url), "hf://me/mine")) is kind


@pytest.mark.parametrize(
    "address",
    [
        "civitai://123",
        "civitai://123?token=s3cret",
        "{host}/models/7/a-name?modelVersionId=123",
        "{host}/api/download/models/123?token=s3cret",
    ],
)
def test_pages_and_downloads_of_civitai_are_versions(address: str) -> None:
    with serving(ranged(lora())) as host:
        info = preflight(civitai=host.url).inspect(address.format(host=host.url))

    assert host.requests[0].target.partition("?")[0] == "/api/download/models/123"
    assert ("token=s3cret" in host.requests[0].target) == ("s3cret" in address)
    assert "s3cret" not in str(info)


def test_a_private_hub_is_open_to_references_only() -> None:
    """A URL of the same host is refused."""
    with serving(hub(body=lora())) as host:
        assert type(failure(preflight(hub=host.url), f"{host.url}/secrets")) is LoraNotAllowed

    assert host.connections == 0


# --- a job is checked before anything is queued


def submitted(broker_url: str, checks: Preflight, *addresses: str) -> None:
    with Client(broker_url, preflight=lambda: checks) as client:
        client.submit(request_for(*addresses), job_id="job-1", preflight=True)


def queued(broker: Any) -> list[str]:
    """Return the keys that a submission leaves in Redis."""
    return [key for key in broker.scan_iter() if not key.startswith("_kombu")]


def test_a_lora_for_the_right_base_model_is_queued(broker_url: str, broker: Any) -> None:
    with serving(ranged(lora())) as host:
        submitted(broker_url, preflight(host), f"{host.url}/a{QUERY}")

    assert "zlora:job:job-1" in queued(broker)
    assert broker.llen(waiting_lists("gpu")[5]) == 1


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (lora(width=768), LoraMismatch, "made for SD 1.x: cross-attention width 768"),
        (lora("lora_unet_double_blocks_0_img_attn_proj"), LoraMismatch, "made for Flux"),
        (saved({"weight": torch.ones(1)}), LoraMismatch, "not a LoRA"),
        (saved({f"{SDXL}.oft_blocks": torch.ones(1)}), LoraMismatch, "OFT"),
        (
            saved(kohya_lora() | {"bundle_emb.x.clip_l": torch.ones(1, 768)}),
            EmbeddingMismatch,
            "one encoder only",
        ),
        (PAGE, NotSafetensors, "a web page"),
    ],
)
def test_a_job_with_an_unusable_lora_is_not_queued(
    broker_url: str, broker: Any, body: bytes, kind: type[LoraError], words: str
) -> None:
    """The error names the index of the LoRA."""
    with (
        serving(ranged(lora())) as good,
        serving(ranged(body)) as bad,
        pytest.raises(kind, match=words) as raised,
    ):
        submitted(broker_url, preflight(good, bad), f"{good.url}/a", f"{bad.url}/b{QUERY}")

    assert type(raised.value) is kind
    assert raised.value.details["index"] == 1
    said_by(raised.value)
    assert queued(broker) == []


@pytest.mark.parametrize(
    ("body", "base", "other"),
    [
        (lora(width=768), "SD 1.x", "SDXL"),
        (lora(width=1024), "SD 2.x", "SD 1.x"),
        (lora(width=2048), "SDXL", "SD 1.x"),
        (lora("lora_unet_input_blocks_1_1_proj_in", width=320), "SD 2.x", "SDXL"),
        (lora(width=2048), "SDXL", "Z-Image"),
        (lora("transformer.layers.0.attention.to_q", width=3840), "Z-Image", "SDXL"),
        (lora("lora_unet__layers_0_attention_qkv", width=3840), "Z-Image", "SD 1.x"),
        (lora("diffusion_model.context_refiner.0.attention.out", width=96), "Z-Image", "SDXL"),
    ],
)
def test_a_lora_must_be_for_the_base_model_of_the_queue(body: bytes, base: str, other: str) -> None:
    """The message names both base models."""
    with serving(ranged(body)) as host:
        checks, file = preflight(host), Asset(url=f"{host.url}/a.safetensors")
        request = GenerateRequest(prompt="", loras=(LoraSpec(file=file),))

        checks.check(request, base=base)
        with pytest.raises(LoraMismatch, match=f"made for .*{base[:2]}.*of the queue is {other}"):
            checks.check(request, base=other)


def test_a_refusal_says_if_the_base_model_of_the_queue_is_not_known() -> None:
    with serving(ranged(lora("transformer.layers.0.attention.to_q", width=3840))) as host:
        file = Asset(url=f"{host.url}/a.safetensors")
        request = GenerateRequest(prompt="", loras=(LoraSpec(file=file),))

        with pytest.raises(LoraMismatch, match=r"made for Z-Image.*not known, and taken for SDXL"):
            preflight(host).check(request)


def test_changes_of_text_encoders_have_no_schedule() -> None:
    module = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    with serving(ranged(lora(module, width=768))) as host:
        file = Asset(url=f"{host.url}/a.safetensors")
        checks, spec = preflight(host), LoraSpec(file=file, start=0.5, strict=False)
        with pytest.raises(LoraMismatch, match="`text_encoder_weight: 0`"):
            checks.check(GenerateRequest(prompt="", loras=(spec,)))

        silent = msgspec.structs.replace(spec, text_encoder_weight=0.0)
        checks.check(GenerateRequest(prompt="", loras=(silent,)))


@pytest.mark.parametrize("options", [{"strict": False}, {"weight": 0.0}])
def test_a_base_model_that_the_header_names_matters_to_strict_jobs_only(
    options: dict[str, Any],
) -> None:
    """The self-attention of the middle block has the same shapes in SD 1.x."""
    module = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    body = lora(module, width=1280, metadata={"ss_base_model_version": "sd_v1"})
    with serving(ranged(body)) as host:
        file = Asset(url=f"{host.url}/a.safetensors")
        checks, request = preflight(host), GenerateRequest(prompt="", loras=(LoraSpec(file=file),))
        with pytest.raises(LoraMismatch, match=r"made for SD 1\.x, by its header"):
            checks.check(request)

        checks.check(GenerateRequest(prompt="", loras=(LoraSpec(file=file, **options),)))


@pytest.mark.parametrize(
    ("tensors", "kind", "words"),
    [
        ({"emb_params": torch.ones(2, 768)}, EmbeddingMismatch, "one encoder only.*SD 1.x"),
        ({"clip_l": torch.ones(2, 768)}, EmbeddingMismatch, "nothing for text_encoder_2"),
        ({"vae": torch.ones(1, 2, 3)}, EmbeddingMismatch, "not an embedding"),
        (None, NotSafetensors, "a web page"),
    ],
)
def test_a_job_with_an_unusable_embedding_is_not_queued(
    broker_url: str, broker: Any, tensors: Tensors | None, kind: type[LoraError], words: str
) -> None:
    """The error names the list and the index in it; a good embedding is queued."""
    good = saved({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)})
    bad = PAGE if tensors is None else saved(tensors)
    with serving(ranged(good)) as one, serving(ranged(bad)) as other:
        specs = [
            {"file": {"url": f"{host.url}/e{QUERY}"}, "token": host.name} for host in (one, other)
        ]
        with Client(broker_url, preflight=lambda: preflight(one, other)) as client:
            with pytest.raises(kind, match=words) as raised:
                client.submit({"prompt": "x", "embeddings": specs}, preflight=True)
            assert queued(broker) == []
            request = {"prompt": "x", "embeddings": specs[:1]}
            client.submit(request, job_id="job-1", preflight=True)

    assert raised.value.details["index"] == 1
    assert raised.value.details["field"] == "embeddings"
    said_by(raised.value)
    assert "zlora:job:job-1" in queued(broker)


EMBEDDINGS: Final = {
    "SDXL": {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)},
    "SD 1.x": {"emb_params": torch.ones(2, 768)},
    "SD 2.x": {"<zebra>": torch.ones(1024)},
}


@pytest.mark.parametrize("base", EMBEDDINGS)
@pytest.mark.parametrize("made_for", EMBEDDINGS)
def test_an_embedding_must_be_for_the_base_model_of_the_queue(base: str, made_for: str) -> None:
    with serving(ranged(saved(EMBEDDINGS[made_for]))) as host:
        file = Asset(url=f"{host.url}/zebra.safetensors")
        request = GenerateRequest(prompt="", embeddings=(EmbeddingSpec(file=file),))
        checks = preflight(host)

        if base == made_for:
            checks.check(request, base=base)
        else:
            with pytest.raises(EmbeddingMismatch, match=f"{made_for}.*{base}"):
                checks.check(request, base=base)


@pytest.mark.parametrize(
    ("tensors", "base", "words"),
    [
        *((tensors, base, ()) for base, tensors in list(EMBEDDINGS.items())[:2]),
        (EMBEDDINGS["SD 2.x"], "SD 2.x", ("<zebra>",)),
        ({"zebra": torch.ones(1, 768)}, "SD 1.x", ()),
        ({"<a>": torch.ones(768), "<b>": torch.ones(2, 768)}, "SD 1.x", ("<a>", "<b>")),
    ],
)
def test_an_embedding_is_described_with_its_base_model(
    tensors: Tensors, base: str, words: tuple[str, ...]
) -> None:
    with serving(ranged(saved(tensors))) as host:
        info = preflight(host).inspect(f"{host.url}/a.safetensors")

    assert (info.base, info.kinds, info.trigger_words) == (base, ("embedding",), words)


def test_a_job_with_an_absent_lora_is_not_queued(broker_url: str, broker: Any) -> None:
    with serving(reply(status=404)) as host, pytest.raises(LoraNotFound) as raised:
        submitted(broker_url, preflight(host), f"{host.url}/a{QUERY}")

    assert raised.value.details == {"status": 404, "index": 0}
    assert queued(broker) == []


@pytest.mark.parametrize("address", ["s3://b/a", "cozy://a/b", "file:///a", "demo://a"])
def test_addresses_that_only_a_worker_opens_are_not_checked(
    broker_url: str, broker: Any, address: str
) -> None:
    with watched_connections() as connections:
        submitted(broker_url, preflight(), address)

    assert "zlora:job:job-1" in queued(broker)
    assert len(set(connections)) == 1  # the broker's


@pytest.mark.parametrize("status", [401, 403])
def test_files_that_require_a_token_are_not_checked(
    broker_url: str, broker: Any, status: int
) -> None:
    with serving(reply(status=status)) as host:
        submitted(broker_url, preflight(host), f"{host.url}/a")

    assert "zlora:job:job-1" in queued(broker)


@pytest.mark.parametrize("address", ["ftp://h/a", "https://127.0.0.1/a"])
def test_a_job_with_a_refused_address_is_not_queued(
    broker_url: str, broker: Any, address: str
) -> None:
    with pytest.raises(LoraNotAllowed):
        submitted(broker_url, preflight(), address)

    assert queued(broker) == []


def test_nothing_is_checked_without_preflight(broker_url: str, broker: Any) -> None:
    with serving(reply(status=404)) as host, Client(broker_url) as client:
        client.submit(request_for(f"{host.url}/a"), job_id="job-1")

    assert host.connections == 0
    assert "zlora:job:job-1" in queued(broker)


def test_an_invalid_request_is_refused_before_any_connection(broker_url: str) -> None:
    with (
        serving(reply(status=404)) as host,
        Client(broker_url, preflight=lambda: preflight(host)) as client,
    ):
        for odd in ({"priority": "urgent"}, {"expires_in": -1}, {"job_id": "../x"}):
            with pytest.raises(InvalidRequest):
                client.submit(request_for(f"{host.url}/a"), preflight=True, **odd)

    assert host.connections == 0


# --- settings


def test_the_environment_names_hosts_and_sites(broker_url: str, broker: Any) -> None:
    with (
        serving(hub(body=lora())) as hugging,
        serving(ranged(lora())) as site,
        serving(ranged(lora())) as own,
    ):
        sites = {
            "HF_ENDPOINT": "http://h",
            "ZLORA_HF_ENDPOINT": hugging.url,
            "ZLORA_CIVITAI_URL": site.url,
        }
        environ = {"ZLORA_BROKER_URL": broker_url, "ZLORA_ALLOW_HOSTS": own.name, **sites}
        with Client.from_env(environ) as client:
            addresses = ("hf://me/mine/a.safetensors", "civitai://1", f"{own.url}/a")
            client.submit(request_for(*addresses), job_id="job-1", preflight=True)

    assert [len(host.requests) for host in (hugging, site, own)] == [1, 1, 1]
    assert "zlora:job:job-1" in queued(broker)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ZLORA_ALLOW_HOSTS", "http://us3r:s3cret@h"),
        ("ZLORA_ALLOW_HOSTS", "h:99999"),
        ("ZLORA_CA_BUNDLE", "/not/there"),
        ("ZLORA_HF_ENDPOINT", "ftp://s3cret"),
        ("HF_ENDPOINT", "mirror"),
        ("ZLORA_CIVITAI_URL", "us3r:s3cret@h"),
    ],
)
def test_an_invalid_variable_is_named_and_matters_for_preflight_only(
    broker_url: str, broker: Any, name: str, value: str
) -> None:
    with Client.from_env({"ZLORA_BROKER_URL": broker_url, name: value}) as client:
        client.submit({"prompt": "a city"}, job_id="job-1")
        with pytest.raises(InvalidSetting) as raised:
            client.submit({"prompt": "a city"}, job_id="job-2", preflight=True)

    assert raised.value.details == {"name": name}
    assert "s3cret" not in str(raised.value)
    assert "zlora:job:job-2" not in queued(broker)


def test_the_environment_names_certificates(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.touch()

    assert Preflight.from_env({"ZLORA_CA_BUNDLE": str(path)})._certificates == str(path)


def test_a_light_install_gets_advice_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        zlora.lora.preflight, "find_spec", lambda name: None if name != "ssrfguard" else object()
    )

    with pytest.raises(
        InvalidSetting, match=r"requests, huggingface_hub .*pip install 'z-image-lora\[preflight\]'"
    ):
        Preflight()


# --- the command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, **variables: str) -> Any:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return CliRunner().invoke(main, ["inspect", *arguments])


def test_inspect_prints_a_description(monkeypatch: pytest.MonkeyPatch) -> None:
    body = lora(metadata={"modelspec.trigger_phrase": "[bold]ohwx[/bold]"})
    with serving(ranged(body)) as host:
        result = run(monkeypatch, f"{host.url}/a{QUERY}", ZLORA_ALLOW_HOSTS=host.name)

    assert result.exit_code == 0
    for words in (
        f"{host.url}/a",
        f"{len(body):,} bytes",
        "kohya",
        "SDXL",
        "[bold]ohwx[/bold]",
        "1 in unet",
    ):
        assert words in result.output
    assert not [secret for secret in SECRETS if secret in result.output]


def test_inspect_prints_json_and_accepts_a_bare_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(hub("a.safetensors", body=lora())) as host:
        result = run(monkeypatch, "me/mine", "--json", ZLORA_HF_ENDPOINT=host.url)

    printed = json.load(io.StringIO(result.output))
    assert (printed["source"], printed["base"], printed["ranks"]) == ("hf://me/mine", "SDXL", [4])


def test_inspect_prints_an_error_in_one_line_and_exits_with_its_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(reply(status=404)) as host:
        result = run(monkeypatch, f"{host.url}/a{QUERY}", ZLORA_ALLOW_HOSTS=host.name)

    assert result.exit_code == 66
    assert result.output.strip() == f"Error: {host.url}/a: the server answers 404 [lora_not_found]"


def test_each_file_of_a_sweep_is_read_once() -> None:
    """Also that of a LoRA which only some of the images have."""

    def answer(request: Request) -> bytes:
        return reply(status=404) if request.target.startswith("/gone") else reply(lora())

    with serving(answer) as host:
        first, second, gone = ({"url": f"{host.url}/{name}"} for name in ("a", "b", "gone"))
        document = {"prompt": "a", "loras": [{"file": first}, {"file": first}]}
        axes = {"loras[0].weight": [0.5, 1, 2], "loras[1].file": [first, second]}
        preflight(host).check(parse_request(document | {"sweep": axes}))
        assert len(host.requests) == 2

        axes = {"loras[1].file": [first, gone]}
        with pytest.raises(LoraNotFound) as raised:
            preflight(host).check(parse_request(document | {"sweep": axes}))

    assert raised.value.details["index"] == 1
