"""A few thousand mutated adapter files: each is read, or refused with a sentence; nothing in them ever runs.

`pytest -c tests/pytest.ini tests/core/test_fuzz.py -rP` prints how many of each there were.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sun import SunAdapter, SunFileError, SunInfo, files

EXAMPLES = int(os.environ.get("SUN_FUZZ_EXAMPLES", "200"))  # of each test that mutates; `make test-all` takes 2000
LONGEST = 800  # characters of a message, without the path

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,  # the same files every time: a red run can be repeated
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def valid(folder: Path) -> dict[str, bytes]:
    """The same small adapter in both layouts, guided or not, as files."""
    made: dict[str, bytes] = {}
    torch.manual_seed(0)
    info = SunInfo("Tiny", guidance_scale=4.0, stage_length=0.25, training={"steps": 3})
    for name, layout, positive, guided in (
        ("sun", "sun", True, False),
        ("official", "official", True, False),
        ("guided", "sun", False, True),
    ):
        adapter = SunAdapter([4, 6], 5, positive, info=info, guided=guided)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
        adapter.save(folder / "valid", layout=layout)
        made[name] = (folder / "valid").read_bytes()
    return made


class Reader:
    """Reads bytes as an adapter file and counts what became of them."""

    def __init__(self, folder: Path) -> None:
        self.file, self.ran, self.counts = folder / "adapter.safetensors", folder / "ran", Counter[str]()

    def __call__(self, content: bytes) -> None:
        self.file.write_bytes(content)
        try:
            adapter = files.read(self.file)
        except SunFileError as error:
            self.counts["refused"] += 1
            self._is_a_sentence(str(error))
        else:
            self.counts["read"] += 1
            assert all(value.isfinite().all() for layer in adapter.layers for value in layer.values())
            assert len(adapter.names) == len(adapter.layers) == len(adapter.channels)
        assert not self.ran.exists(), "code in the file was run"

    def _is_a_sentence(self, message: str) -> None:
        assert message.startswith(str(self.file)), message
        assert message.endswith("."), message
        assert message.isprintable(), message
        assert len(message) <= LONGEST + len(str(self.file)), message


@pytest.fixture
def read(folder: Path) -> Iterator[Reader]:
    reader = Reader(folder)
    yield reader
    print(", ".join(f"{count} {what}" for what, count in sorted(reader.counts.items())))


NAMES = st.sampled_from(["sun", "official", "guided"])


# --------------------------------------------------------------------------------------------------------------- bytes


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A few cuts, insertions, overwritten or doubled stretches, at places given as shares of the length."""
    share = st.floats(0, 1)
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["cut", "insert", "overwrite", "double", "end"]), share, share, st.binary(max_size=9)
            ),
            min_size=1,
            max_size=4,
        )
    )

    def apply(content: bytes) -> bytes:
        for kind, start, length, new in steps:
            at = int(start * len(content))
            to = at + int(length * min(40, len(content) - at))
            if kind == "end":
                content = content[:at]
            elif kind == "cut":
                content = content[:at] + content[to:]
            elif kind == "insert":
                content = content[:at] + new + content[at:]
            elif kind == "overwrite":
                content = content[:at] + new + content[at + len(new) :]
            else:
                content = content[:at] + content[at:to] * 2 + content[to:]
        return content

    return apply


@fuzz
@given(NAMES, edits())
def test_edited_bytes(valid: dict[str, bytes], read: Reader, name: str, edit: Callable[[bytes], bytes]) -> None:
    read(edit(valid[name]))


@fuzz
@given(st.sampled_from([b"", b"{", b"\x80\x02", b"\x80\x04", b"PK\x03\x04", b"version https://git-lfs"]), st.binary())
def test_anything_at_all(read: Reader, start: bytes, rest: bytes) -> None:
    read(start + rest)
    read(struct.pack("<Q", len(rest) + 1) + b"{" + rest)


# -------------------------------------------------------------------------------------------------------------- header

TEXTS = st.one_of(
    st.sampled_from(
        ["", "..", "\0", "\n", "nan", "inf", "1e999", "-1", "0", "true", "[]", "{", "9" * 5000, "[" * 9000]
    ),
    st.text(max_size=20),
)
KEYS = st.one_of(
    st.sampled_from([
        "1.to_k_neg.weight", "999999.to_k_neg_alpha", "1.alpha_neg_w", "x" * 9000 + ".to_k_neg.weight",
        ".to_v_neg.weight", "down_blocks.0.attentions.0.to_k_neg.weight", "up_blocks." + "9" * 400 + ".alpha_neg",
        "\ud800", "é.to_k_neg.weight",
    ]),
    st.text(max_size=12),
)  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "X", "", 3, None]
SIZES = st.one_of(st.integers(-1, 8), st.sampled_from([2**31, 2**40, 2**63 - 1, 2**64, 1.5, "a", None]))
SHAPES = st.one_of(st.lists(SIZES, max_size=4), st.sampled_from([[1] * 300, [0] * 3, None, 4, "4"]))
OFFSETS = st.one_of(st.lists(SIZES, max_size=3), st.none())
VALUES = {"dtype": st.sampled_from(DTYPES), "shape": SHAPES, "data_offsets": OFFSETS}


@st.composite
def header_edits(draw: st.DrawFn) -> Callable[[dict[str, Any]], None]:
    kind = draw(st.sampled_from(["field", "field", "no field", "rename", "drop", "add", "metadata", "metadata type"]))
    place, field = draw(st.integers(0, 999)), draw(st.sampled_from(sorted(VALUES)))
    value, key, text = draw(VALUES[field]), draw(KEYS), draw(TEXTS)
    own = draw(st.sampled_from(["w", "stage_length", "training", "layers", "format", "branches", "normalized", "x"]))

    def edit(header: dict[str, Any]) -> None:
        names = [name for name in header if name != "__metadata__"]
        name = names[place % len(names)] if names else key
        entry = header.get(name)
        if kind == "metadata":
            known = header.get("__metadata__")
            header["__metadata__"] = {**(known if isinstance(known, dict) else {}), own: text}
        elif kind == "metadata type":
            header["__metadata__"] = [None, 3, {"w": 4.0}, {"training": {}}, [text]][place % 5]
        elif kind == "add" or not isinstance(entry, dict):
            header[key] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], field: value}
        elif kind == "field":
            entry[field] = value
        elif kind == "no field":
            entry.pop(field, None)
        elif kind == "rename":
            header[key] = header.pop(name)
        else:
            del header[name]

    return edit


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@fuzz
@given(NAMES, st.lists(header_edits(), min_size=1, max_size=3))
def test_edited_headers(valid: dict[str, bytes], read: Reader, name: str, header_changes: list) -> None:
    header, data = split(valid[name])
    for change in header_changes:
        change(header)
    read(join(json.dumps(header).encode(), data))


@fuzz
@given(
    NAMES, st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 3000)), st.sampled_from(["utf-8", "utf-16", "latin-1"])
)
def test_lengths_that_lie_and_other_encodings(
    valid: dict[str, bytes], read: Reader, name: str, length: int, encoding: str
) -> None:
    header, data = split(valid[name])
    header["__metadata__"]["base_model"] = "é"
    text = json.dumps(header, ensure_ascii=False).encode(encoding)
    read(join(text, data, length))
    read(join(text, data))


@fuzz
@given(NAMES, st.integers(0, 999), st.sampled_from(["same", "other"]))
def test_doubled_keys(valid: dict[str, bytes], read: Reader, name: str, place: int, entry: str) -> None:
    header, data = split(valid[name])
    names = list(header)
    first = json.dumps(header[names[place % len(names)] if entry == "same" else names[(place * 7 + 1) % len(names)]])
    twice = f'{{"{names[place % len(names)]}": {first}, ' + json.dumps(header)[1:]
    read(join(twice.encode(), data))


@fuzz
@given(NAMES, st.integers(0, 10**6), st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\1\0\0\0"]))
def test_values_that_are_no_numbers(valid: dict[str, bytes], read: Reader, name: str, place: int, value: bytes) -> None:
    """float32 NaN, infinities, and a denormal number, which is allowed."""
    header, data = split(valid[name])
    at = place % (len(data) // 4) * 4
    before = read.counts["refused"]
    read(join(json.dumps(header).encode(), data[:at] + value + data[at + 4 :]))
    assert (read.counts["refused"] > before) == (value != b"\1\0\0\0")


# -------------------------------------------------------------------------------------------------------------- pickles


class Exploit:
    """Makes a file when it is unpickled by something that runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


ODD: dict[str, Callable[[Path], Any]] = {
    "code": Exploit,
    "list": lambda _: [1.0],
    "nothing": lambda _: None,
    "sparse": lambda _: torch.eye(4).to_sparse(),
    "compressed": lambda _: torch.eye(4).to_sparse_csr(),
    "meta": lambda _: torch.empty(4, 5, device="meta"),
    "vast": lambda _: torch.zeros(1).expand(10**6, 10**6),
    "nested": lambda _: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "quantized": lambda _: torch.quantize_per_tensor(torch.zeros(4, 5), 0.1, 0, torch.qint8),
    "complex": lambda _: torch.zeros(4, 5, dtype=torch.complex64),
    "parameter": lambda _: torch.nn.Parameter(torch.zeros(4, 5)),
    "transposed": lambda _: torch.zeros(5, 4).t(),
    "integers": lambda _: torch.zeros(4, 5, dtype=torch.int64),
}
WRITERS: dict[str, Callable[[Any, io.BytesIO], None]] = {
    "zip": torch.save,
    "legacy": lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
    "pickle": pickle.dump,
}


@pytest.mark.filterwarnings("ignore")  # torch warns of sparse, nested and quantized tensors
@fuzz
@given(
    st.sampled_from(sorted(ODD)),
    st.sampled_from(sorted(WRITERS)),
    st.one_of(st.integers(0, 15), st.sampled_from(["x", 7, None, ("a", "b")])),
    st.booleans(),
    st.one_of(st.none(), edits()),
)
def test_pickles(
    folder: Path, valid: dict[str, bytes], read: Reader, odd: str, writer: str, place: Any, inside: bool,
    edit: Callable[[bytes], bytes] | None,
) -> None:  # fmt: skip
    (folder / "official").write_bytes(valid["official"])
    tensors: dict[Any, Any] = dict(load_file(folder / "official"))
    tensors[list(tensors)[place] if isinstance(place, int) and place < len(tensors) else place] = ODD[odd](read.ran)
    file = io.BytesIO()
    WRITERS[writer]({"state_dict": tensors} if inside else tensors, file)
    read(edit(file.getvalue()) if edit else file.getvalue())


def test_a_pickle_that_unpacks_to_more_than_it_is_is_refused(
    read: Reader, valid: dict[str, bytes], folder: Path
) -> None:
    """torch never compresses; a compressed one would fill the memory."""
    import zipfile

    plain, bomb = io.BytesIO(), io.BytesIO()
    torch.save({"1.to_k_neg.weight": torch.zeros(1000, 1000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert len(bomb.getvalue()) < 100_000
    read(bomb.getvalue())
    assert read.counts == {"refused": 1}


def test_the_unchanged_files_are_read(valid: dict[str, bytes], read: Reader) -> None:
    for content in valid.values():
        read(content)
    assert read.counts == {"read": len(valid)}
