"""JSON that workers of older versions have written is read; `tests/compat.py` runs such workers."""

import msgspec
import pytest
from click.testing import CliRunner
from zlora import Client
from zlora.broker.job_store import JobStore, connect
from zlora.cli import main
from zlora.errors import InvalidRequest
from zlora.schema import digest_of, parse_request, parse_result

# By a worker without `cells`, `batch_size`, `embeddings`, receipts of prompts, and `base`.
RESULT = """{
  "job_id": "single_lora-c46460",
  "images": [{
    "key": "runs/single_lora-c46460/outputs/0.png", "width": 64, "height": 64,
    "content_type": "image/png", "size": 6803,
    "sha256": "3ed12f866430a4aae5b780283efe68fccdf9bd6a24bbe852aea701c2883d47c0",
    "seed": 8395085846363391,
    "url": "file:///store/runs/single_lora-c46460/outputs/0.png", "url_expires_at": null,
    "pixels_sha256": "066522631d58a92cd5f70ae47959c8cfdb5ece14b662c6fd548aded3ae743f4c",
    "tiled": false, "data_uri": null
  }],
  "loras": [{
    "source": "http://127.0.0.1:44987/anime-style.safetensors",
    "sha256": "900888b9d3245346f9cd994cdbec5ac1244c1dd64c2fd62cbb8ea3a8c9b17647",
    "size": 813116, "format": "kohya", "ranks": [8, 10],
    "unet_weight": 0.8, "text_encoder_weight": 0.8, "modules": {"unet": 118},
    "tier": "memory", "milliseconds": {"fetch": 0.335, "parse": 13.08}, "adapter_name": null,
    "kinds": ["lora"], "unmatched": {}, "unmatched_names": [], "relative_norm": 0.251201,
    "tensors_sha256": "c384273665be07b5141c00c6f420d696d3ad8b2840f9d3fa3c2aa53f329c346e",
    "config_sha256": null, "warnings": []
  }],
  "seed": 8395085846363391,
  "timings": {
    "queued": 26.261251, "fetch": 0.000377, "parse": 0.01355, "apply": 0.018258,
    "denoise": 2.110144, "restore": 0.058213, "tail": 0.005074, "encode": 0.009434,
    "upload": 0.015826
  },
  "base_intact": true, "model": "demo",
  "versions": {"z-image-lora": "0.1.0", "torch": "2.13.0+cpu"},
  "base_checked": 1.0, "tiled": false, "attempt": 1,
  "started_at": 1796120441.076055, "finished_at": 1796120443.2872355,
  "request_sha256": "31a997472e15278c6ba4d7c192c3a8a2903b0333c8bc4e7393532ae8ca0a1eb6",
  "request": {
    "prompt": "a portrait in anime style",
    "loras": [{
      "file": {
        "url": "http://127.0.0.1:44987/anime-style.safetensors",
        "sha256": "900888b9d3245346f9cd994cdbec5ac1244c1dd64c2fd62cbb8ea3a8c9b17647"
      },
      "weight": 0.8
    }]
  },
  "base_sha256": "4539acfbae8623718288329ab1acc519dfd746f270e516f73ed2f96918ebfa6a",
  "model_sha256": null, "scheduler": "EulerDiscreteScheduler", "device": "cpu AVX512",
  "dtype": "float32", "threads": 1, "compile": "off"
}"""

# By a worker without `models` and `limits`.
QUEUE = """{
  "base": "SDXL", "model": "demo",
  "base_sha256": "4539acfbae8623718288329ab1acc519dfd746f270e516f73ed2f96918ebfa6a",
  "width": 64, "height": 64, "scheduler": "EulerDiscreteScheduler", "num_inference_steps": 28,
  "guidance_scale": 7.5, "schedulers": ["ddim", "euler", "heun", "lcm"], "timeout": 870,
  "url_policies": ["file", "key"], "url_expires_in": 86400, "serves_catalogue_only": false,
  "catalogue": ["anime-style", "neon-lights"],
  "versions": {"z-image-lora": "0.1.0", "torch": "2.13.0+cpu"}, "loaded_at": 1796119962.542756
}"""


def test_a_result_is_read_with_all_that_it_says() -> None:
    result = parse_result(RESULT)

    read = msgspec.json.decode(msgspec.json.encode(result))
    written = msgspec.json.decode(RESULT)
    (image,), (lora,) = read["images"], read["loras"]
    assert image | written["images"][0] == image
    assert lora | written["loras"][0] == lora
    assert read | written | {"images": [image], "loras": [lora]} == read


def test_the_same_request_is_still_the_same_job() -> None:
    result = parse_result(RESULT)
    sent = {
        "prompt": "a portrait in anime style",
        "loras": [
            {"file": {"url": "http://127.0.0.1:44987/anime-style.safetensors"}, "weight": 0.8}
        ],
    }

    assert digest_of(parse_request(sent)) == result.request_sha256


def test_what_a_queue_serves_is_read_and_requests_are_compared_with_it(broker_url: str) -> None:
    JobStore(connect(broker_url), "gpu").put_queue_info(QUEUE.encode())

    shown = CliRunner().invoke(main, ["info", "--json"], env={"ZLORA_BROKER_URL": broker_url})
    with Client(broker_url) as client:
        client.submit({"prompt": "a city", "clip_skip": 1, "loras": lora_with_blocks()})
        for refused in ({"model": "demo"}, {"scheduler": "unipc"}, {"timeout": 871}):
            with pytest.raises(InvalidRequest, match="what this queue serves"):
                client.submit({"prompt": "a city", **refused})

    read, written = msgspec.json.decode(shown.output), msgspec.json.decode(QUEUE)
    assert read | written == read


def lora_with_blocks() -> list[object]:
    """Return a LoRA with a field that only some families of base models honour."""
    return [{"file": {"url": "lora://anime-style"}, "blocks": {"down.1": 0.5}}]
