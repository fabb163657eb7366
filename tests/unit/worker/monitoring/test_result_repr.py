"""How logs and Flower show a result, and that the producer gets the plain document."""

from typing import Any

import pytest
from celery.utils.saferepr import saferepr
from kombu.utils.json import dumps
from zlora.schema import GenerateResult, ImageRef, LoraReceipt, to_dict
from zlora_worker.monitoring.result_repr import MAX_SHOWN, ResultPayload

SIGNED = "https://store.example/runs/job-1/outputs/0.png?X-Amz-Signature=t0ken"


def result(count: int = 2, loras: tuple[LoraReceipt, ...] = (), **fields: Any) -> GenerateResult:
    images = tuple(
        ImageRef(
            key=f"runs/job-1/outputs/{index}.png",
            width=8,
            height=8,
            content_type="image/png",
            size=1,
            sha256="0",
            seed=3,
            url=SIGNED,
        )
        for index in range(count)
    )
    whole: dict[str, Any] = {
        "seed": 3,
        "timings": {"denoise": 2.0},
        "base_intact": True,
        "model": "m",
        "versions": {},
    }
    return GenerateResult(job_id="job-1", images=images, loras=loras, **whole | fields)


def receipt(**fields: Any) -> LoraReceipt:
    whole: dict[str, Any] = {
        "source": "https://example.com/anime.safetensors",
        "sha256": "0",
        "size": 1,
        "format": "kohya",
        "ranks": (16,),
        "unet_weight": 0.8,
        "text_encoder_weight": 0.8,
        "modules": {},
        "tier": "network",
        "milliseconds": {},
    }
    return LoraReceipt(**whole | fields)


def celery_repr(made: GenerateResult) -> str:
    """Return what Celery writes to its log and its events."""
    return saferepr(ResultPayload(made), MAX_SHOWN)


def test_the_line_has_keys_base_check_seconds_and_loras() -> None:
    made = result(
        loras=(receipt(adapter_name="anime"), receipt(ranks=(4, 8), tier="disk")),
        started_at=10.0,
        finished_at=22.26,
    )

    assert celery_repr(made) == (
        "2 images; base intact; 12.3 s; runs/job-1/outputs/0.png, 1.png; "
        "loras: 'anime' rank 16 0.8 (network), "
        "'https://example.com/anime.safetensors' rank 4/8 0.8 (disk)"
    )


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (result(1), "1 image; base intact; runs/job-1/outputs/0.png"),
        (result(0, base_intact=False), "0 images; base not intact"),
    ],
)
def test_the_line_leaves_out_what_the_result_has_not(made: GenerateResult, line: str) -> None:
    assert celery_repr(made) == line


def test_the_line_is_short_and_printable_for_any_lora_names() -> None:
    names = [
        "x" * 200,
        "a\nb\x1b[2J",
        "https://us3r:pa55@example.com/x?sig=t0ken",
        '"quoted"',
        "\u202eright to left",
    ]
    line = celery_repr(
        result(4, tuple(receipt(adapter_name=name, ranks=tuple(range(100))) for name in 2 * names))
    )

    assert len(line) <= MAX_SHOWN
    assert line.isprintable()
    assert line.startswith("4 images; base intact; ")
    assert not [secret for secret in ("us3r", "pa55", "t0ken") if secret in line]


def test_the_serialized_payload_is_the_plain_document() -> None:
    made = result(loras=(receipt(),))

    assert dumps({"result": ResultPayload(made)}) == dumps({"result": to_dict(made)})
    assert ResultPayload(made) == to_dict(made)
