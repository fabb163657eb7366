"""Images of a result are fetched as the result names them, or fail without showing a secret."""

import base64
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest
from support.servers import Request, reply, serving
from zlora import images
from zlora.errors import ImageUnavailable, InvalidJobId
from zlora.schema import GenerateResult, ImageRef, parse_request
from zlora.testing import fake_result

DATA = b"the bytes of an image"
QUERY = "?X-Amz-Signature=s3cret"


def image(**given: Any) -> ImageRef:
    fields = {
        "key": "runs/job-1/outputs/0.png",
        "width": 8,
        "height": 8,
        "content_type": "image/png",
        "seed": 1,
        "size": len(DATA),
        "sha256": hashlib.sha256(DATA).hexdigest(),
    }
    return msgspec.convert(fields | given, ImageRef)


def inline(data: bytes = DATA) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def result(*images: ImageRef, job_id: str = "job-1") -> GenerateResult:
    made = fake_result("job-1", parse_request({"prompt": "a city"}))
    return msgspec.structs.replace(made, job_id=job_id, images=images)


def refusal(ref: ImageRef) -> str:
    """Return the message for an image that cannot be fetched."""
    with pytest.raises(ImageUnavailable) as raised:
        images.read(ref, timeout=5)
    assert raised.value.details == {"key": ref.key}
    assert "s3cret" not in str(raised.value)
    return str(raised.value)


# --- read


def test_an_image_is_read_from_each_kind_of_address(tmp_path: Path) -> None:
    path = tmp_path / "an image%.png"
    path.write_bytes(DATA)
    with serving(reply(DATA)) as host:
        for given in (
            {"url": path.as_uri()},
            {"url": f"{host.url}/0.png{QUERY}"},
            {"url": "data:,the%20bytes%20of%20an%20image"},
            {"data_uri": inline(), "url": "https://images.invalid/0.png"},
        ):
            assert images.read(image(**given)) == DATA

        assert host.asked == [f"GET /0.png{QUERY}"]


def test_a_redirect_is_followed_to_http_only(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(DATA)

    places = {"/web": "/0.png", "/file": path.as_uri(), "/ftp": "ftp://127.0.0.1/"}

    def answer(request: Request) -> bytes:
        if request.target == "/0.png":
            return reply(DATA)
        return reply(status=302, Location=places[request.target])

    with serving(answer) as host:
        assert images.read(image(url=f"{host.url}/web")) == DATA
        for target in ("/file", "/ftp"):
            assert refusal(image(url=host.url + target))


def test_only_the_given_hosts_are_opened_also_by_a_redirect(tmp_path: Path) -> None:
    with serving(reply(DATA)) as internal:
        elsewhere = reply(status=302, Location=f"http://localhost:{internal.port}/0.png")
        with serving(elsewhere) as host:
            ref = image(url=f"{host.url}/0.png{QUERY}")
            for hosts in ({"images.test"}, {f"127.0.0.1:{internal.port}"}, {host.name}):
                with pytest.raises(ImageUnavailable, match="ZLORA_IMAGE_HOSTS does not list"):
                    images.save(result(ref), tmp_path, hosts=hosts)
            assert len(host.asked) == 1
            assert internal.asked == []

            for hosts in ({host.name, "localhost"}, {host.name, f"localhost:{internal.port}"}):
                assert images.read(ref, hosts=hosts) == DATA


@pytest.mark.parametrize("body", [DATA[:-1], DATA + b"!", b"x" * len(DATA), b""])
def test_bytes_with_another_checksum_or_size_are_refused(body: bytes) -> None:
    with serving(reply(body)) as host:
        assert "not those of the image" in refusal(image(url=f"{host.url}/0.png{QUERY}"))
    assert "not those of the image" in refusal(image(data_uri=inline(body)))


def test_no_more_bytes_are_read_than_the_image_has() -> None:
    """An endless answer is cut."""
    with serving(
        lambda _: itertools.chain([reply(length=None)], itertools.repeat(bytes(65_536)))
    ) as host:
        assert refusal(image(url=f"{host.url}/0.png"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (None, "has no URL"),
        ("file:///no/such/0.png", "no such file on this machine"),
        ("s3://bucket/0.png", "images are not fetched by 's3'"),
        ("0.png", "images are not fetched by ''"),
        ("data:image/png;base64,%%%", "the inline image"),
        (f"http://127.0.0.1:1/0.png{QUERY}", "refused"),
        (f"http://[/0.png{QUERY}", "ValueError"),
    ],
)
def test_an_unavailable_image_is_reported_without_its_query(url: str | None, reason: str) -> None:
    assert reason in refusal(image(url=url))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe would wait for its writer, and a device may have no end."""
    os.mkfifo(tmp_path / "pipe")

    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        assert "it is not a regular file" in refusal(image(url=path.as_uri()))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply(status=403), "the server answers 403"),
        (reply(DATA[:5], length=len(DATA)), "not those of the image"),
        (b"no answer of the web", "BadStatusLine"),
    ],
)
def test_the_answer_of_a_failing_server_is_reported(answer: bytes, reason: str) -> None:
    with serving(answer) as host:
        assert reason in refusal(image(url=f"{host.url}/0.png{QUERY}"))


def test_a_slow_image_meets_the_deadline() -> None:
    left = Event()

    def answer(_: Request) -> Iterator[bytes]:
        yield reply(DATA[:1], length=len(DATA))
        left.wait(20)

    with serving(answer) as host:
        with pytest.raises(ImageUnavailable, match="takes more than 0 s"):
            images.read(image(url=f"{host.url}/0.png"), timeout=5, deadline=0)
        left.set()


# --- save


def test_images_are_saved_under_job_and_index(tmp_path: Path) -> None:
    """They replace files, have the usual rights, and leave no drafts."""
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / "job-1-0.png").write_bytes(b"older")
    (folder / "any").touch()

    paths = images.save(
        result(image(data_uri=inline()), image(data_uri=inline(), content_type="image/webp")),
        folder,
    )

    assert [path.name for path in paths] == ["job-1-0.png", "job-1-1.webp"]
    assert [path.read_bytes() for path in paths] == [DATA, DATA]
    assert {path.stat().st_mode for path in paths} == {(folder / "any").stat().st_mode}
    assert sorted(folder.iterdir()) == sorted([*paths, folder / "any"])


def test_a_link_that_another_user_planted_is_replaced_and_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at the name of an image nor at that of its draft, even if the draft's is known."""
    folder, target = tmp_path / "shared", tmp_path / "target"
    folder.mkdir()
    target.write_bytes(b"older")
    (folder / "job-1-0.png").symlink_to(target)
    images.save(result(image(data_uri=inline())), folder)

    monkeypatch.setattr("zlora.files.secrets.token_hex", lambda _: "known")
    (folder / ".job-1-0.png.known").symlink_to(target)
    with pytest.raises(FileExistsError):
        images.save(result(image(data_uri=inline())), folder)

    assert target.read_bytes() == b"older"
    assert (folder / "job-1-0.png").read_bytes() == DATA


def test_an_unavailable_image_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "job-1-0.png").write_bytes(b"older")

    with pytest.raises(ImageUnavailable) as raised:
        images.save(result(image(data_uri=inline(b"others"))), tmp_path)
    assert raised.value.details["job_id"] == "job-1"

    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("job-1-0.png", b"older")
    ]


def test_a_result_cannot_name_a_path_outside_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidJobId):
        images.save(result(image(data_uri=inline()), job_id="../job-1"), tmp_path / "folder")
    with pytest.raises(ImageUnavailable, match="not an image but"):
        images.save(
            result(image(data_uri=inline(), content_type="image/../../x")), tmp_path / "folder"
        )

    assert not list(tmp_path.rglob("*job*"))
