"""Digests and names that identify a base model, a LoRA and a machine."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fakes import a_request, copy_model, kohya_lora, load_pipeline, settings
from support.single_file import write_single_file
from support.tiny_folder import tiny_model
from zlora_worker.model import loader
from zlora_worker.model.checksum import WeightDigests
from zlora_worker.model.pipeline import Pipeline

VAE = "vae/diffusion_pytorch_model.safetensors"


def test_a_base_has_the_same_sha256_in_every_layout(
    model: Pipeline, model_home: Path, tmp_path: Path
) -> None:
    """A single file also has the digest by which model sites know it; a folder has none."""
    path = write_single_file(tiny_model(model_home), tmp_path / "tiny.safetensors")

    single = load_pipeline(
        model_home, ZLORA_MODEL=str(path), ZLORA_MODEL_CONFIG=str(tiny_model(model_home))
    )

    assert single.base_sha256 == model.base_sha256
    assert single.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.file_sha256 is None


def test_one_changed_bit_gives_another_sha256(
    model: Pipeline, model_home: Path, tmp_path: Path
) -> None:
    folder = copy_model(model_home, tmp_path / "model")
    tensors = load_file(folder / VAE)
    last = tensors["decoder.conv_out.bias"].view(torch.int32)
    last[-1] ^= 1
    save_file(tensors, folder / VAE, metadata={"format": "pt"})

    changed = load_pipeline(model_home, ZLORA_MODEL=str(folder))

    assert changed.base_sha256 != model.base_sha256


def test_another_dtype_gives_another_sha256(model: Pipeline, model_home: Path) -> None:
    """The last bits of its images differ."""
    half = load_pipeline(model_home, ZLORA_DTYPE="bfloat16")

    assert half.base_sha256 != model.base_sha256
    assert (half.machine.dtype, model.machine.dtype) == ("bfloat16", "float32")


def test_a_machine_is_known_by_the_conditions_that_change_last_bits(model: Pipeline) -> None:
    torch.set_num_threads(2)
    two = model.machine
    torch.set_num_threads(1)

    assert two == model.machine._replace(threads=2)
    assert model.machine.device == f"cpu {torch.backends.cpu.get_cpu_capability()}"


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (None, "EulerDiscreteScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("dpmpp_2m_karras", "DPMSolverMultistepScheduler karras"),
    ],
)
def test_the_scheduler_of_a_job_has_its_name_in_diffusers(
    model: Pipeline, scheduler: str | None, name: str
) -> None:
    assert model.scheduler_name(a_request(scheduler=scheduler)) == name


def test_the_sha256_of_a_lora_does_not_depend_on_its_header(
    model: Pipeline, tmp_path: Path
) -> None:
    """Other tools compute it in the same way, over the bytes after the header."""
    tensors = {name: tensor.clone().contiguous() for name, tensor in kohya_lora().items()}
    found = []
    for index, metadata in enumerate(
        ({"format": "pt"}, {"format": "pt", "ss_output_name": "a" * 1000})
    ):
        path = tmp_path / f"{index}.safetensors"
        save_file(tensors, path, metadata=metadata)
        data = path.read_bytes()
        after = data[8 + int.from_bytes(data[:8], "little") :]
        lora = model.reader.read(path, digest="0" * 64, source="a")
        assert lora.tensors_sha256 == hashlib.sha256(after).hexdigest()
        found.append(lora.tensors_sha256)

    assert len(set(found)) == 1


# --- a model that is loaded again


@pytest.fixture
def single_file(model_home: Path, tmp_path: Path) -> dict[str, str]:
    """Variables of a worker whose model is one file."""
    path = write_single_file(tiny_model(model_home), tmp_path / "tiny.safetensors")
    return {"ZLORA_MODEL": str(path), "ZLORA_MODEL_CONFIG": str(tiny_model(model_home))}


def test_a_model_that_is_loaded_again_has_its_digests_without_hashing(
    single_file: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that replaces another one saves the time of two digests of all bytes."""
    first = load_pipeline(tmp_path, **single_file)
    monkeypatch.setattr(WeightDigests, "add", None)
    monkeypatch.setattr(hashlib, "file_digest", None)

    again = load_pipeline(tmp_path, **single_file)

    assert again.base_sha256 == first.base_sha256
    assert again.file_sha256 == first.file_sha256


def test_a_model_whose_files_have_changed_meanwhile_has_its_own_digests(
    single_file: dict[str, str], tmp_path: Path
) -> None:
    """One bit differs, and the size of the file does not."""
    path = Path(single_file["ZLORA_MODEL"])
    first = load_pipeline(tmp_path, **single_file)
    tensors = load_file(path)
    tensors["first_stage_model.decoder.conv_out.bias"].view(torch.int32)[-1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})

    changed = load_pipeline(tmp_path, **single_file)

    assert changed.base_sha256 != first.base_sha256
    assert changed.base_sha256 == load_pipeline(tmp_path / "other", **single_file).base_sha256
    assert changed.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_pipeline(tmp_path, **single_file).base_sha256 == changed.base_sha256


def test_damaged_or_missing_records_of_digests_change_nothing(
    single_file: dict[str, str], tmp_path: Path
) -> None:
    first = load_pipeline(tmp_path, **single_file)
    (record,) = (tmp_path / "digests").iterdir()
    whole = record.read_bytes()
    for damage in (b"", b"[]", b'{"base": {"base_sha256": 1}}', b"\xff"):
        record.write_bytes(damage)

        assert load_pipeline(tmp_path, **single_file).base_sha256 == first.base_sha256
        assert record.read_bytes() == whole
    shutil.rmtree(tmp_path / "digests")
    (tmp_path / "digests").touch()  # no folder can be made
    assert load_pipeline(tmp_path, **single_file).base_sha256 == first.base_sha256


def test_a_load_leaves_the_number_of_threads(model_home: Path) -> None:
    """Its own threads use one each; images depend on the number."""
    torch.set_num_threads(2)
    loader.load(settings(model_home))
    after = torch.get_num_threads()
    torch.set_num_threads(1)

    assert after == 2
