"""`zlora generate` and `submit` with the in-memory worker: their options and their output."""

import base64
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from support.played import Signalling
from support.servers import Request, reply, serving
from zlora.cli import connection, main
from zlora.errors import LoraNotFound
from zlora.schema import (
    TIMED_PHASES,
    GenerateRequest,
    GenerateResult,
    parse_request,
    to_dict,
)
from zlora.testing import MemoryWorker, Progress, fake_result

DATA = b"the bytes of an image"
LORA = "https://host:8080/x.safetensors"


def draw(job_id: str, request: GenerateRequest, progress: Progress) -> GenerateResult:
    """Draw like the in-memory worker, with images that can be saved and complete receipts."""
    progress("denoising", 1, 2)
    if "gone" in request.prompt:
        raise LoraNotFound("there is none", {"status": 404})
    made = fake_result(job_id, request)
    uri = f"data:image/png;base64,{base64.b64encode(DATA).decode()}"
    found = {"size": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest(), "data_uri": uri}
    images = tuple(msgspec.structs.replace(image, **found) for image in made.images)
    used = {"ranks": (8, 16), "modules": {"unet": 3}, "relative_norm": 0.0125, "tier": "disk"}
    loras = tuple(msgspec.structs.replace(receipt, **used) for receipt in made.loras)
    sheet = msgspec.structs.replace(made.sheet, **found) if made.sheet else None
    return msgspec.structs.replace(made, images=images, loras=loras, sheet=sheet)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MemoryWorker:
    made = MemoryWorker(draw=draw)
    monkeypatch.setattr(connection, "client", made.client)
    monkeypatch.chdir(tmp_path)
    return made


def run(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=given)


def requested(worker: MemoryWorker) -> dict[str, Any]:
    """Return the only request, without defaults."""
    (request,) = worker.requests.values()
    document: dict[str, Any] = json.loads(json.dumps(to_dict(request)))
    return document


# --- the request


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ([], {}),
        (["--negative", "fog"], {"negative_prompt": "fog"}),
        (["--prompt-syntax", "a1111"], {"prompt_syntax": "a1111"}),
        (["--clip-skip", "1"], {"clip_skip": 1}),
        (["--model", "anime"], {"model": "anime"}),
        (["--steps", "12"], {"num_inference_steps": 12}),
        (["--guidance", "0"], {"guidance_scale": 0.0}),
        (["--size", "1024x768"], {"width": 1024, "height": 768}),
        (["--seed", "0", "-n", "4"], {"seed": 0, "num_images": 4}),
        (["-n", "4", "--batch-size", "2"], {"num_images": 4, "batch_size": 2}),
        (["--scheduler", "Euler a"], {"scheduler": "Euler a"}),
        (["--schedule", "trailing"], {"schedule": "trailing"}),
        (["--scheduler", "ddim", "--eta", "0.5"], {"scheduler": "ddim", "eta": 0.5}),
        (["--format", "webp", "--quality", "80"], {"output_format": "webp", "quality": 80}),
        (["--timeout", "60"], {"timeout": 60.0}),
        (["--upscale", "2"], {"upscale": {"factor": 2.0}}),
        (
            ["--upscale", "2", "--upscale-strength", "0.3", "--upscale-steps", "9"],
            {"upscale": {"factor": 2.0, "strength": 0.3, "steps": 9}},
        ),
        (
            ["--upscale", "1.5", "--upscale-mode", "latent"],
            {"upscale": {"factor": 1.5, "mode": "latent"}},
        ),
        (
            ["--image", LORA, "--mask", "job:a#0", "--strength", "0.5", "--mask-blur", "4"],
            {"image": {"url": LORA}, "mask": {"url": "job:a#0"}, "strength": 0.5, "mask_blur": 4.0},
        ),
        (
            ["--image", "cozy://owner/a", "--mask", LORA, "--mask-invert"],
            {"image": {"cozy_ref": "owner/a"}, "mask": {"url": LORA}, "mask_invert": True},
        ),
        (
            ["--axis", "seed=1,2", "--axis", "guidance_scale=1, 7.5", "--axis", "scheduler=ddim"],
            {
                "sweep": {
                    "seed": [1, 2],
                    "guidance_scale": [1.0, 7.5],
                    "scheduler": ["ddim"],
                }
            },
        ),
        (
            ["--axis", "steps=4,8", "--axis", "guidance=1", "--axis", "negative=a,b"],
            {
                "sweep": {
                    "num_inference_steps": [4, 8],
                    "guidance_scale": [1.0],
                    "negative_prompt": ["a", "b"],
                }
            },
        ),
        (
            ["--lora", LORA, "--axis", f"loras[0].file={LORA},cozy://a/b"],
            {
                "loras": [{"file": {"url": LORA}}],
                "sweep": {"loras[0].file": [{"url": LORA}, {"cozy_ref": "a/b"}]},
            },
        ),
        (
            ["--axis", 'prompt=["a, b", "c"]', "--axis", "scheduler=null,Euler a"],
            {"sweep": {"prompt": ["a, b", "c"], "scheduler": [None, "Euler a"]}},
        ),
        (
            ["--recipes", "off", "--trigger-words", "add"],
            {"recipes": "off", "trigger_words": "add"},
        ),
    ],
)
@pytest.mark.parametrize("command", ["generate", "submit"])
def test_an_option_is_a_field_of_the_request(
    worker: MemoryWorker, command: str, options: list[str], fields: dict[str, Any]
) -> None:
    result = run(command, "a city", *options)

    assert result.exit_code == 0, result.output
    assert requested(worker) == {"prompt": "a city", **fields}


@pytest.mark.parametrize(
    "axis", ["seed", "seed=", "=1", "seed=[1", "seed= ", "loras[0].weight=[NaN]"]
)
def test_an_axis_without_values_is_refused(worker: MemoryWorker, axis: str) -> None:
    for options in (["--axis", axis], ["--axis", "seed=1", "--axis", "seed=2"]):
        result = run("sweep", "a city", "--lora", LORA, *options)
        assert result.exit_code in (2, 65)
    assert not worker.requests


def test_a_sweep_saves_its_images_and_its_sheet(worker: MemoryWorker) -> None:
    """Each image is printed with its values."""
    axes = ["--axis", "loras[0].weight=0,1", "--axis", "seed=5,6"]
    result = run("sweep", "a city", "--lora", LORA, *axes, "--job-id", "job", "--out", "images")

    assert result.exit_code == 0, result.output
    names = ["job-0.png", "job-1.png", "job-2.png", "job-3.png", "job-sheet.jpeg"]
    assert sorted(path.name for path in Path("images").iterdir()) == names
    (line,) = [line for line in result.stdout.splitlines() if "job-3.png" in line]
    assert "(seed 6, 1024x1024, x weight 1)" in line
    assert "sheet: images/job-sheet.jpeg" in result.stdout
    found = json.loads(run("result", "job", "--out", "again", "--json").stdout)
    assert found["files"] == [f"again/{name}" for name in names]


def test_a_prompt_may_be_an_axis_alone(worker: MemoryWorker) -> None:
    assert run("sweep", "--axis", "prompt=a,b").exit_code == 0
    assert requested(worker) == {"prompt": "a", "sweep": {"prompt": ["a", "b"]}}


def test_the_command_sweep_is_for_sweeps(worker: MemoryWorker) -> None:
    result = run("sweep", "a city")

    assert result.exit_code == 2
    assert "--axis" in result.output
    assert not worker.requests


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        (LORA, {"url": LORA}, 1.0),
        (f"{LORA}:0.8", {"url": LORA}, 0.8),
        (f"{LORA}:-1", {"url": LORA}, -1.0),
        (f"{LORA}:.5", {"url": LORA}, 0.5),
        (f"{LORA}:1e-1", {"url": LORA}, 0.1),
        (
            "hf://owner/repo/x.safetensors@main:2",
            {"url": "hf://owner/repo/x.safetensors@main"},
            2.0,
        ),
        ("civitai://123", {"url": "civitai://123"}, 1.0),
        ("civitai://123:0.3", {"url": "civitai://123"}, 0.3),
        ("s3://bucket/a:b", {"url": "s3://bucket/a:b"}, 1.0),
        ("owner/repo:0.7", {"url": "owner/repo"}, 0.7),
        ("owner/repo:nan", {"url": "owner/repo:nan"}, 1.0),
        ("cozy://owner/name:0.5", {"cozy_ref": "owner/name"}, 0.5),
    ],
)
def test_the_number_after_the_last_colon_of_a_lora_is_its_weight(
    worker: MemoryWorker, text: str, file: dict[str, str], weight: float
) -> None:
    run("submit", "a city", "--lora", text)
    (spec,) = requested(worker)["loras"]

    assert (spec["file"], spec.get("weight", 1.0)) == (file, weight)


@pytest.mark.parametrize(
    ("text", "weight", "alpha"),
    [
        ("owner/repo:alpha=8", 1.0, 8.0),
        ("owner/repo:0.5:alpha=.5", 0.5, 0.5),
        ("owner/repo:0:alpha=1e2", 0.0, 100.0),
    ],
)
def test_a_lora_may_end_in_its_alpha(
    worker: MemoryWorker, text: str, weight: float, alpha: float
) -> None:
    run("submit", "a city", "--lora", text)
    (spec,) = requested(worker)["loras"]

    assert spec["file"] == {"url": "owner/repo"}
    assert (spec.get("weight", 1.0), spec["alpha"]) == (weight, alpha)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (":start=0.2:end=.8", {"start": 0.2, "end": 0.8}),
        (":0.7:end=0.5:alpha=8", {"weight": 0.7, "end": 0.5, "alpha": 8.0}),
        (":weights=1@0,-0.3@0.5", {"weights": [[0.0, 1.0], [0.5, -0.3]]}),
        (":blocks=0.5@down.1,0@mid", {"blocks": {"down.1": 0.5, "mid": 0.0}}),
        (":1.5:start=0.1:blocks=2@IN04", {"weight": 1.5, "start": 0.1, "blocks": {"IN04": 2.0}}),
    ],
)
def test_a_lora_may_end_in_its_strengths_over_steps_and_by_block(
    worker: MemoryWorker, options: str, fields: dict[str, Any]
) -> None:
    run("submit", "a city", "--lora", f"hf://owner/repo/x.safetensors@main{options}")
    (spec,) = requested(worker)["loras"]

    assert json.loads(json.dumps(spec)) == {
        "file": {"url": "hf://owner/repo/x.safetensors@main"},
        **fields,
    }


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("owner/repo", {"file": {"url": "owner/repo"}}),
        ("<s0><s1>=owner/repo", {"file": {"url": "owner/repo"}, "token": "<s0><s1>"}),
        ("https://a.b/c?d=e", {"file": {"url": "https://a.b/c?d=e"}}),
        ("cat=cozy://owner/cat", {"file": {"cozy_ref": "owner/cat"}, "token": "cat"}),
    ],
)
def test_an_embedding_may_begin_with_its_word(
    worker: MemoryWorker, text: str, spec: dict[str, Any]
) -> None:
    run("submit", "a city", "--embedding", text)

    assert requested(worker)["embeddings"] == [spec]


@pytest.mark.parametrize("name", ["request.json", "-"])
def test_options_replace_fields_of_the_document(
    worker: MemoryWorker, tmp_path: Path, name: str
) -> None:
    document = {
        "prompt": "a city",
        "seed": 7,
        "loras": [{"file": {"url": "owner/one"}}],
        "inline": True,
    }
    (tmp_path / "request.json").write_text(json.dumps(document))

    result = run(
        "submit",
        "--request",
        name,
        "--seed",
        "8",
        "--lora",
        "owner/two",
        given=json.dumps(document),
    )

    assert result.exit_code == 0, result.output
    (request,) = worker.requests.values()
    assert request == parse_request(
        document | {"seed": 8, "loras": [{"file": {"url": "owner/two"}}]}
    )


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["a city", "--steps", "many"], 2, "many"),
        (["a city", "--size", "big"], 2, "WIDTHxHEIGHT"),
        (["a city", "--format", "gif"], 2, "gif"),
        ([], 2, "PROMPT"),
        (["a city", "--timeout", "nan"], 2, "nan"),
        (["a city", "--expires-in", "nan"], 2, "nan"),
        (["--request", "no/such"], 2, "No such file"),
        (["a city", "--steps", "0"], 65, "$.num_inference_steps"),
        (["a city", "--lora", "owner/repo:9"], 65, "$.loras[0].weight"),
        (["a city", "--job-id", "../x"], 65, "[invalid_job_id]"),
        (["a city", "--expires-in", "-1"], 65, "expires_in"),
        (["a city", "--webhook-event", "job.failed"], 65, "webhook_events"),
        (["a city", "--job-id", "x", "--idempotency-key", "y"], 65, "idempotency_key"),
        (["--request", "-"], 65, "--request: "),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_sent(
    worker: MemoryWorker, options: list[str], status: int, said: str
) -> None:
    result = run("submit", *options, given='["a city"]')

    assert (result.exit_code, result.stdout) == (status, "")
    assert said in result.stderr
    assert not worker.requests


# --- submit


def test_submit_prints_the_id_and_nothing_else(worker: MemoryWorker) -> None:
    random, named = (
        run("submit", "a city").stdout,
        run("submit", "a city", "--json", "--job-id", "job-1").stdout,
    )

    assert list(worker.requests) == [random.strip(), "job-1"]
    assert json.loads(named) == {"job_id": "job-1"}


def test_the_same_key_is_the_same_job(worker: MemoryWorker) -> None:
    first, second = (
        run("submit", "a city", "--idempotency-key", "order 7").stdout for _ in range(2)
    )

    assert first == second
    assert len(worker.requests) == 1


# --- generate


def test_generate_saves_the_images_and_prints_what_was_used(
    worker: MemoryWorker, tmp_path: Path
) -> None:
    """Without a terminal there is a plain line for each image and LoRA."""
    loras = ("--lora", f"{LORA}:0.8", "--lora", "owner/repo")
    options = (*loras, "--seed", "7", "-n", "2", "--job-id", "j", "--out", "new/folder")
    result = run("generate", "a city", *options)

    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "new/folder").iterdir()} == {
        "j-0.png": DATA,
        "j-1.png": DATA,
    }
    seconds = ", ".join(f"{phase} 0.00" for phase in TIMED_PHASES)
    used = "rank 8, 16, modules 3 in unet, relative norm 0.0125, from disk"
    assert result.stdout.splitlines() == [
        "job: j",
        "image: new/folder/j-0.png (seed 7, 1024x1024)",
        "image: new/folder/j-1.png (seed 8, 1024x1024)",
        f"seconds: {seconds}",
        "base intact: yes",
        "model: zlora.testing",
        "scheduler: none",
        f"LoRA: {LORA} (weight 0.8, {used})",
        f"LoRA: hf://owner/repo (weight 1, {used})",
    ]
    assert result.stderr.startswith("job j\n")
    assert list(worker.requests) == ["j"]


def test_preview_is_a_field_of_the_request(worker: MemoryWorker) -> None:
    assert run("generate", "a city", "--preview", "--out", "a").exit_code == 0
    assert requested(worker) == {"prompt": "a city", "previews": True}


def test_generate_prints_the_batch_size_of_images_that_were_drawn_together(
    worker: MemoryWorker,
) -> None:
    result = run("generate", "a city", "-n", "2", "--batch-size", "2", "--seed", "7", "--out", "a")

    assert "-1.png (seed 8, 1024x1024, batch size 2)\n" in result.stdout


@pytest.mark.usefixtures("worker")
def test_generate_prints_strengths_over_steps_and_by_block() -> None:
    lora = "owner/repo:0.5:start=0.2:end=0.8:blocks=0.5@down.1,0@mid"
    result = run("generate", "a city", "--lora", lora, "--lora", "owner/other", "--out", ".")

    lines = [line for line in result.stdout.splitlines() if " by " in line]
    assert lines == [
        "weight by step: hf://owner/repo: 0 from 1, 0.5 from 7, 0 from 24",
        "factor by block: hf://owner/repo: down.1 0.5, mid 0",
    ]


def test_generate_prints_how_often_an_embedding_was_used(worker: MemoryWorker) -> None:
    result = run("generate", "a cat", "--embedding", "cat=owner/repo", "--out", ".")

    assert "embedding: cat (vectors 1, used 1, hf://owner/repo)" in result.stdout.splitlines()


@pytest.mark.usefixtures("worker")
def test_with_json_the_result_and_its_files_are_one_document() -> None:
    result = run("generate", "a city", "--job-id", "j", "--json")
    document = json.loads(result.stdout)

    assert document["files"] == ["j-0.png"]
    assert Path("j-0.png").read_bytes() == DATA
    assert msgspec.convert(document["result"], GenerateResult).job_id == document["job_id"] == "j"


def test_control_characters_in_a_result_are_replaced(
    monkeypatch: pytest.MonkeyPatch, worker: MemoryWorker
) -> None:
    def with_controls(job_id: str, request: GenerateRequest, progress: Progress) -> GenerateResult:
        return msgspec.structs.replace(
            draw(job_id, request, progress), model="\x1b[2Jmodel\nbase intact: no"
        )

    monkeypatch.setattr(worker, "_draw", with_controls)

    assert "model: ?[2Jmodel?base intact: no\n" in run("generate", "a city").stdout


@pytest.mark.usefixtures("worker")
def test_a_failed_job_ends_with_its_error_and_saves_nothing(tmp_path: Path) -> None:
    as_line, as_json = run("generate", "gone"), run("generate", "gone", "--json", "--job-id", "j")

    assert (as_line.exit_code, as_line.stdout) == (66, "")
    assert as_line.stderr.endswith("\nError: there is none [lora_not_found]\n")
    assert as_json.exit_code == 66
    assert json.loads(as_json.stdout)["error"]["details"] == {"status": 404, "job_id": "j"}
    assert not list(tmp_path.iterdir())


def test_the_job_continues_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = MemoryWorker(paused=True)
    monkeypatch.setattr(connection, "client", worker.client)
    result = run("generate", "a city", "--job-id", "j", "--wait", "0.1")

    assert result.exit_code == 75
    assert result.stderr.splitlines() == [
        "job j",
        "queued (0 before it)",
        "Error: no result of job j within 0.1 s [result_timeout]",
    ]
    assert worker.run() == 1


def test_nan_is_refused_as_a_wait(worker: MemoryWorker) -> None:
    assert (
        run("generate", "a city", "--wait", "nan").exit_code
        == run("result", "x", "--wait", "nan").exit_code
        == 2
    )
    assert not worker.requests


@pytest.mark.parametrize("given", [b"\xef\xbb\xbf{}", b'{"prompt": "\xff"}', 5000 * b"[", b""])
def test_a_document_that_is_not_json_is_refused_in_one_line(
    worker: MemoryWorker, given: bytes
) -> None:
    result = CliRunner().invoke(main, ["submit", "--request", "-"], input=given)

    assert (result.exit_code, result.stderr.count("\n")) == (65, 1)
    assert result.stderr.startswith("Error: --request: ")
    assert not worker.requests


def test_nothing_is_drawn_if_the_folder_cannot_be_written(
    worker: MemoryWorker, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")
    as_line, as_json = (
        run("generate", "a city", "--out", "out"),
        run("generate", "a city", "--out", "out", "--json"),
    )

    assert (as_line.exit_code, as_line.stderr) == (73, "Error: out: File exists [cannot_write]\n")
    assert as_json.exit_code == 73
    assert json.loads(as_json.stdout)["error"]["details"] == {"path": "out"}
    assert not worker.requests


def test_an_error_after_the_job_is_drawn_names_it(
    monkeypatch: pytest.MonkeyPatch, worker: MemoryWorker, tmp_path: Path
) -> None:
    """The images may be impossible to download, or to write."""

    def block_folder(job_id: str, request: GenerateRequest, _progress: Progress) -> GenerateResult:
        (tmp_path / "out").rmdir()
        (tmp_path / "out").write_text("a file")
        return fake_result(job_id, request)

    monkeypatch.setattr(worker, "_draw", without_urls)
    unseen = run("generate", "a city", "--job-id", "unseen", "--json")
    monkeypatch.setattr(worker, "_draw", block_folder)
    unwritten = run("generate", "a city", "--job-id", "unwritten", "--json", "--out", "out")

    assert (unseen.exit_code, unwritten.exit_code) == (75, 73)
    assert json.loads(unseen.stdout)["error"]["details"] == {
        "key": "runs/unseen/outputs/0.png",
        "job_id": "unseen",
    }
    assert json.loads(unwritten.stdout)["error"]["details"] == {
        "path": "out",
        "job_id": "unwritten",
    }


@pytest.mark.parametrize(
    ("modules", "shown"),
    [
        ({"unet": 3, "text_encoder": 1}, "weight 0.8, 1 in text encoders"),
        ({"unet": 3}, "weight 0.8, "),
        ({"transformer": 3}, "weight 0.8, "),
    ],
)
def test_a_weight_in_text_encoders_is_shown_if_the_lora_changes_some(
    monkeypatch: pytest.MonkeyPatch, worker: MemoryWorker, modules: dict[str, int], shown: str
) -> None:
    def with_modules(job_id: str, request: GenerateRequest, progress: Progress) -> GenerateResult:
        made = draw(job_id, request, progress)
        return msgspec.structs.replace(
            made, loras=(msgspec.structs.replace(made.loras[0], modules=modules),)
        )

    monkeypatch.setattr(worker, "_draw", with_modules)
    spec = {"file": {"url": LORA}, "unet_weight": 0.8}
    request = json.dumps({"prompt": "a city", "loras": [spec]})

    found = run("generate", "--request", "-", given=request)

    assert found.exit_code == 0, found.output
    (line,) = [line for line in found.output.splitlines() if "weight" in line]
    assert shown in line
    assert ("text encoders" in line) == ("text_encoder" in modules)


def without_urls(job_id: str, request: GenerateRequest, _progress: Progress) -> GenerateResult:
    """Return a result whose images have keys and no URLs."""
    return fake_result(job_id, msgspec.structs.replace(request, url_policy="key"))


# --- streams and signals


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("name", [[], ["--job-id", "mine"], ["--idempotency-key", "order 7"]])
def test_a_signal_without_a_terminal_cancels_the_job_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: list[str]
) -> None:
    """Signals that come while it cancels change nothing."""
    worker = Signalling(after=1)
    monkeypatch.setattr(connection, "client", worker.client)
    monkeypatch.chdir(tmp_path)
    result = run("generate", "a city", *name)

    (job_id,) = worker.requests
    assert (result.exit_code, worker.run()) == (143, 1 if name else 0)
    assert f"job {job_id} {'continues' if name else 'is cancelled'}" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_while_images_are_saved_says_how_to_save_them_later(
    monkeypatch: pytest.MonkeyPatch, worker: MemoryWorker
) -> None:
    def answer(_: Request) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        return reply(b"a", length=100)

    with serving(answer) as host:

        def elsewhere(job_id: str, request: GenerateRequest, _progress: Progress) -> GenerateResult:
            made = fake_result(job_id, request)
            images = tuple(
                msgspec.structs.replace(image, size=100, url=host.url) for image in made.images
            )
            return msgspec.structs.replace(made, images=images)

        monkeypatch.setattr(worker, "_draw", elsewhere)
        drawn = run("generate", "a city", "--job-id", "j", "--out", "my images")
        fetched = run("result", "j", "--out", "my images", "--json")

    said = "job j is done: zlora result j --out 'my images'"
    assert (drawn.exit_code, fetched.exit_code) == (130, 130)
    assert drawn.stderr.endswith(f"\n{said} [interrupted]\n")
    told = json.loads(fetched.stdout)["error"]
    assert (told["message"], told["details"]) == (said, {"job_id": "j"})


def test_closed_streams_do_not_stop_a_command(
    monkeypatch: pytest.MonkeyPatch, worker: MemoryWorker, tmp_path: Path
) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    for arguments, status in (
        (["generate", "a city", "--job-id", "j"], 0),
        (["submit", "--request", "-"], 2),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status
    assert (tmp_path / "j-0.png").exists()
    assert list(worker.requests) == ["j"]


def test_characters_that_the_output_cannot_encode_are_escaped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(connection, "client", MemoryWorker(draw=draw).client)
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "printed").open("w", encoding="latin-1") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            main(["generate", "a city", "--out", "\u0416"])

    assert ended.value.code == 0
    assert "image: \\u0416/" in (tmp_path / "printed").read_text()
