"""Headers that safetensors writes are read, and invalid files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from support.servers import lora_bytes, tensor_file, untimed
from zlora.errors import NotSafetensors
from zlora.lora.safetensors_header import MAX_HEADER, Header, read_header

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
}
one_folder = settings(
    untimed,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read(folder: Path, data: bytes) -> Header:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    return read_header(path)


def refusal(folder: Path, data: bytes) -> str:
    with pytest.raises(NotSafetensors) as raised:
        read(folder, data)
    json.dumps(raised.value.details)
    return raised.value.message


def entry(
    begin: int = 0, end: int = 4, *, dtype: str = "F16", shape: object = (2,)
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- safetensors itself as the oracle


@one_folder
@given(
    shapes=st.dictionaries(
        st.text(max_size=10), st.lists(st.integers(0, 4), max_size=4), max_size=5
    ),
    dtypes=st.lists(st.sampled_from(list(DTYPES)), min_size=5, max_size=5),
    metadata=st.none() | st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=3),
)
def test_files_of_safetensors_are_read_with_the_same_tensors_and_metadata(
    tmp_path: Path,
    shapes: dict[str, list[int]],
    dtypes: list[torch.dtype],
    metadata: dict[str, str] | None,
) -> None:
    shapes.pop("__metadata__", None)  # the format's own word
    assume(
        shapes or metadata != {}
    )  # safetensors 0.8 writes of these two what it cannot read itself
    tensors = {
        name: torch.zeros(shape, dtype=dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=False)
    }

    header = read(tmp_path, save(tensors, metadata))

    assert header.metadata == (metadata or {})
    assert {name: (info.dtype, list(info.shape)) for name, info in header.tensors.items()} == {
        name: (DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()
    }


numbers = st.integers(-1, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64 - 1, 2**64, 10**30])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F32", "F64", "F4", "C64", "X", ""]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, min_size=2, max_size=2),
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "", "\x00", "\ud800"]), entries, max_size=3)


@one_folder
@given(header=headers, data_size=st.integers(0, 9))
@example(header={"a": entry(0, 0, dtype="U8", shape=[2**64 - 1, 2, 0])}, data_size=0)
@example(header={"\ud800": entry(0, 4)}, data_size=4)
@example(header={"__metadata__": {"a": "\ud800"}}, data_size=0)
def test_safetensors_reads_every_file_that_is_accepted(
    tmp_path: Path, header: dict[str, Any], data_size: int
) -> None:
    """Otherwise the file would fail later, in a job that has begun."""
    try:
        taken = read(tmp_path, tensor_file(header, bytes(data_size)))
    except NotSafetensors:
        return

    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == set(taken.tensors)
        assert {name: tuple(file.get_slice(name).get_shape()) for name in taken.tensors} == {
            name: info.shape for name, info in taken.tensors.items()
        }


def test_a_header_with_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    """As by safetensors: readers would differ about the metadata."""
    data = tensor_file(b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"}}')
    with pytest.raises(SafetensorError):
        _open(tmp_path, data)

    refusal(tmp_path, data)


def _open(folder: Path, data: bytes) -> None:
    path = folder / "oracle.safetensors"
    path.write_bytes(data)
    with safe_open(path, "pt"):
        pass


# --- any bytes

json_bytes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=10,
).map(lambda value: json.dumps(value).encode())


@one_folder
@given(
    data=st.binary(max_size=200)
    | st.binary(max_size=100).map(tensor_file)
    | json_bytes.map(tensor_file)
    | st.tuples(json_bytes, st.binary(max_size=20)).map(
        lambda parts: tensor_file(b'{"a":' + parts[0] + b"}", parts[1])
    )
)
@example(data=b"")
@example(data=tensor_file(b'{"a":' + b"[" * 200_000))
@example(data=tensor_file(b'{"a":{"dtype":"\xff","shape":[],"data_offsets":[0,1]}}', b"x"))
@example(data=tensor_file(b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"))
@example(
    data=tensor_file(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}', b"x"
    )
)
@example(data=tensor_file(b'{"a":{"dtype":"U8","shape":[1e400],"data_offsets":[0,1]}}', b"x"))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    try:
        header = read(tmp_path, data)
    except NotSafetensors:
        return
    assert isinstance(header, Header)


@one_folder
@given(position=st.integers(0, len(lora_bytes(size=16)) - 1), value=st.integers(0, 255))
def test_a_valid_file_with_one_byte_changed_is_read_or_refused(
    tmp_path: Path, position: int, value: int
) -> None:
    data = bytearray(lora_bytes(size=16))
    data[position] = value
    try:
        header = read(tmp_path, bytes(data))
    except NotSafetensors:
        return
    assert (
        sum(info.data_offsets[1] - info.data_offsets[0] for info in header.tensors.values()) == 16
    )


# --- invalid files


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    header = read(tmp_path, lora_bytes())

    assert header.metadata == {"format": "pt"}
    assert sorted(header.tensors) == ["unet.to_q.lora_A.weight", "unet.to_q.lora_B.weight"]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = lora_bytes(size=16)

    for size in range(len(data)):
        refusal(tmp_path, data[:size])


@pytest.mark.parametrize(
    ("header", "size"),
    [
        pytest.param({"a": entry()}, 5, id="a byte more than the header names"),
        pytest.param({"a": entry()}, 3, id="a byte less than the header names"),
        pytest.param({}, 1, id="bytes of no tensor"),
        pytest.param({"a": entry(0, 4), "b": entry(2, 6)}, 6, id="overlap"),
        pytest.param({"a": entry(0, 4), "b": entry(0, 4)}, 4, id="the same bytes twice"),
        pytest.param({"a": entry(0, 4), "b": entry(6, 10)}, 10, id="gap"),
        pytest.param({"a": entry(2, 6)}, 6, id="gap at the start"),
        pytest.param({"a": entry(4, 0)}, 4, id="end before start"),
        pytest.param({"a": entry(0, 4, shape=(3,))}, 4, id="shape too large"),
        pytest.param({"a": entry(0, 4, shape=(1,))}, 4, id="shape too small"),
        pytest.param({"a": entry(0, 4, shape=())}, 4, id="scalar of four bytes"),
        pytest.param({"a": entry(0, 4, shape=(-2, -1))}, 4, id="negative shape"),
        pytest.param({"a": entry(-4, 0)}, 0, id="negative offset"),
    ],
)
def test_a_file_whose_tensors_do_not_tile_it_is_refused(
    tmp_path: Path, header: dict[str, Any], size: int
) -> None:
    refusal(tmp_path, tensor_file(header, bytes(size)))


def test_an_unknown_type_is_refused_by_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, tensor_file({"the tensor": entry(dtype="F17")}, bytes(4)))

    assert "'the tensor'" in message
    assert "'F17'" in message


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_a_tensor_without_one_of_its_fields_is_refused(tmp_path: Path, field: str) -> None:
    facts = entry()
    del facts[field]

    assert field in refusal(tmp_path, tensor_file({"a": facts}, bytes(4)))


@pytest.mark.parametrize("metadata", [None, [], "x", {"a": 1}, {"a": None}])
def test_metadata_other_than_strings_is_refused(tmp_path: Path, metadata: object) -> None:
    refusal(tmp_path, tensor_file({"__metadata__": metadata}))


def test_a_header_that_is_too_long_is_refused_unread(tmp_path: Path) -> None:
    """Its length alone decides; the rest of the file is a hole."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(8 + MAX_HEADER + 1)

    with pytest.raises(NotSafetensors) as raised:
        read_header(path)

    assert raised.value.details == {"header_bytes": MAX_HEADER + 1}


def test_a_tensor_of_more_dimensions_than_any_model_has_is_refused(tmp_path: Path) -> None:
    """The product of many large numbers would keep a core busy for minutes."""
    refusal(tmp_path, tensor_file({"a": entry(0, 4, shape=[1] * 20_000 + [2])}, bytes(4)))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\n  <html><head></head></html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(100), "pickle"),
        (b"PK\x03\x04" + bytes(26) + b"notes.txt" + bytes(100), "a zip archive"),
        ((2**24 + 1).to_bytes(8, "little") + b"{" * 100, "16777217 bytes, at most 16777216"),
        (b"\x80\x02}q\x00." + bytes(100), "pickle"),
        (b"\x80\x04\x95" + b"\xff" * 100, "pickle"),
        (b"\xff" * 100, "not valid"),
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
    ],
)
def test_common_files_of_another_kind_are_named(tmp_path: Path, data: bytes, word: str) -> None:
    assert word in refusal(tmp_path, data)


def test_a_refusal_quotes_little_of_the_file(tmp_path: Path) -> None:
    name = "x" * 100_000
    for header in (
        {name: entry(dtype=name)},
        {name: entry(1, 5)},
        {name: {name: 1}},
        {"__metadata__": {name: 1}},
    ):
        assert len(refusal(tmp_path, tensor_file(header, bytes(4)))) < 400
