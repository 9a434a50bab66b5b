"""Files from elsewhere are read within bounds: no waiting, no filling of memory, no raw error, nothing for a terminal.

`pytest -c tests/pytest.ini tests/common/test_reading.py -rP` prints how many mutated files were read and refused.
"""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import random
import resource
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sun import SunAdapter, SunFileError, SunInfo, files
from sun.common.atomic import file_name, write_atomically, write_json
from sun.common.identity import digest_of, fingerprint, sha256_of, stamp
from sun.common.reading import (
    ReadError,
    decode_text,
    open_regular,
    parse_json,
    printable,
    read_bytes,
    read_json,
    read_text,
)
from sun.common.settings import ConfigError, apply, convert, read_config, read_lines, read_toml
from sun.facts import adapter_facts, describe
from sun.ltc import LtcError, LtcKey, LtcSettings, LtcTable, load_table

MUTATIONS = 1500

# Every reader of a file in the core, and what it raises.
READERS: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "bytes": (read_bytes, ReadError),
    "text": (read_text, ReadError),
    "json": (read_json, ReadError),
    "toml": (read_toml, ReadError),
    "lines": (read_lines, ReadError),
    "settings": (read_config, ConfigError),
    "table": (load_table, LtcError),
    "adapter": (SunAdapter.load, SunFileError),
    "header": (files.header_of, SunFileError),
    "facts": (adapter_facts, SunFileError),
    "inspect": (describe, SunFileError),
    "hash": (sha256_of, ReadError),
    "fingerprint": (fingerprint, ReadError),
}


@pytest.mark.parametrize("name", READERS)
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path, name: str):
    read, error = READERS[name]
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/zero"), Path("/dev/urandom"), Path("/dev/tty")):
        with pytest.raises((error, OSError), match=r"regular file|No such"):
            read(path)


def test_a_file_that_states_no_size_is_bounded():
    with pytest.raises(ReadError, match="longer than"):
        read_bytes("/proc/self/maps", 100)
    assert read_bytes("/proc/self/status", 10**6)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path):
    with (tmp_path / "x.toml").open("wb") as handle:
        handle.truncate(2**40)
    for read in (read_text, read_json, read_toml):
        with pytest.raises(ReadError, match=r"x\.toml has 1,099,511,627,776 bytes"):
            read(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match="at most"):
        read_config(tmp_path / "x.toml")
    with pytest.raises(LtcError, match="at most"):
        load_table(tmp_path / "x.toml")


def test_a_link_to_a_file_is_followed_and_a_folder_is_named(tmp_path: Path):
    (tmp_path / "x").write_text("a")
    (tmp_path / "y").symlink_to("x")
    with open_regular(tmp_path / "y") as handle:
        assert handle.read() == b"a"
    with pytest.raises(ReadError, match="is a folder"):
        open_regular(tmp_path)
    with pytest.raises(ReadError, match="no file name"):
        open_regular("a\0b")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_are_read_in_the_encoding_that_their_mark_says(tmp_path: Path, encoding: str):
    (tmp_path / "x.toml").write_bytes('a = "café 猫"\r\n'.encode(encoding))
    assert read_config(tmp_path / "x.toml") == {"a": "café 猫"}
    (tmp_path / "x.json").write_bytes('{"a": "café 猫"}'.encode(encoding))
    assert read_config(tmp_path / "x.json") == {"a": "café 猫"}
    (tmp_path / "x.txt").write_bytes("café\r\n猫\u2028x\n".encode(encoding))
    assert read_lines(tmp_path / "x.txt") == ["café", "猫\u2028x", ""]


def test_texts_in_no_known_encoding_are_refused_in_a_sentence(tmp_path: Path):
    (tmp_path / "x.toml").write_bytes('a = "café"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"x\.toml is not text in UTF-8 \(byte 8\)\. Save it as UTF-8\."):
        read_config(tmp_path / "x.toml")
    with pytest.raises(ReadError, match="UTF-8"):
        decode_text(b"\xff\xfe\x00", "it")


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "[" * 65 + "]" * 65, "NaN", "[Infinity]", "-Infinity",
                                  "1e999", "9" * 10**5, "-" + "9" * 30, "", "{", "\x00"],
                         ids=lambda text: text[:12])  # fmt: skip
def test_deep_and_infinite_json_is_refused(text: str):
    with pytest.raises(ReadError, match=r"^it "):
        parse_json(text, "it")


def test_infinity_is_read_where_diffusers_writes_it():
    assert parse_json('{"lambda_min_clipped": -Infinity, "sigma_max": Infinity}', "it", infinite=True) == {
        "lambda_min_clipped": -math.inf, "sigma_max": math.inf,
    }  # fmt: skip
    for text in ("NaN", "1e999", "-1e999"):
        with pytest.raises(ReadError, match="not a finite number"):
            parse_json(text, "it", infinite=True)


@pytest.mark.parametrize("text", ["a = " + "[" * 10**5, "a = nan", "a = -inf", "a = 1e999", "a = " + "9" * 5000,
                                  "a = " + "9" * 400, "a = " + "[" * 65 + "]" * 65, ".".join("a" * 70) + " = 1",
                                  "a = " + "{a = " * 2000, "a"],
                         ids=lambda text: text[:12])  # fmt: skip
def test_deep_and_infinite_toml_is_refused(tmp_path: Path, text: str):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.toml"):
        read_config(tmp_path / "x.toml")


def test_ordinary_json_is_read():
    assert parse_json('{"a": [1, -2.5, 18446744073709551615, true, null, "x"]}', "it")["a"][2] == 2**64 - 1


def test_what_a_terminal_would_act_on_is_written_out():
    assert printable("\x1b[2J\x07\x9b0m\r\x00") == r"\x1b[2J\x07\x9b0m\x0d\x00"
    assert printable("a\u202eb\u2066c\ufeff\U000e0041") == r"a\u202eb\u2066c\ufeff\U000e0041"
    assert printable("café 猫 👩‍🚀\xa0«»") == "café 猫 👩‍🚀\xa0«»"
    assert printable("a\nb\tc") == r"a\nb\tc"
    assert printable("a\nb\tc\r", lines=True) == "a\nb\tc\\x0d"


# ---------------------------------------- names, disk


@pytest.mark.parametrize("text", ["../../x", "/etc/passwd", "..", ".", "", ".hidden", "a/b", "a\\b", "C:\\x", "a\0b",
                                  "\x1b[2J", "x" * 500, "nag[phi=3]-4", "dpmpp_2m", "猫", "a..", "con:"])  # fmt: skip
def test_a_name_from_elsewhere_stays_in_its_folder(tmp_path: Path, text: str):
    name = file_name(text)
    assert 0 < len(name) <= 120
    path = write_atomically(tmp_path / name, lambda handle: handle.write(b"x"))
    assert path.resolve().parent == tmp_path.resolve()
    assert not name.startswith(".")


def test_ordinary_names_stay_as_they_are():
    assert [file_name(n) for n in ("dpmpp_2m", "sun-4", "v1.5")] == ["dpmpp_2m", "sun-4", "v1.5"]


@pytest.fixture
def small_disk():
    """No file may grow beyond 20,000 bytes: what a full disk does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file_and_names_the_new(tmp_path: Path, small_disk: None):
    adapter = SunAdapter([64, 64], 64)
    (tmp_path / "a.safetensors").write_bytes(b"before")
    with pytest.raises(OSError, match="too large") as error:
        adapter.save(tmp_path / "a.safetensors")
    assert error.value.filename == str(tmp_path / "a.safetensors")
    with pytest.raises(OSError, match="too large"):
        write_json(tmp_path / "x.json", ["x" * 30_000])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.safetensors": b"before"}


def test_a_folder_in_the_way_is_named_before_anything_is_written(tmp_path: Path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_atomically(tmp_path / "x.png", lambda _: pytest.fail("it was written"))
    assert (error.value.errno, error.value.filename) == (errno.EISDIR, str(tmp_path / "x.png"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_atomically(tmp_path / "file" / "x", lambda _: None)


# ---------------------------------------- identities


def test_identities_notice_changes(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"a")
    before = stamp(path), fingerprint(path), sha256_of(path)
    path.write_bytes(b"bb")
    assert all(a != b for a, b in zip(before, (stamp(path), fingerprint(path), sha256_of(path)), strict=True))
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of([]) == "4f53cda18c2baa0c"  # the beginning of SHA-256 of "[]"


def test_a_folder_with_a_pipe_in_it_is_hashed_without_waiting(tmp_path: Path):
    (tmp_path / "x").write_text("a")
    before = fingerprint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "zero")
    os.symlink(tmp_path, tmp_path / "loop")
    assert fingerprint(tmp_path) == before


# ---------------------------------------- adapters' headers


def adapter(path: Path, **metadata: str) -> Path:
    SunAdapter([4, 6], 5, guided=True, info=SunInfo("Tiny", 4.0, 0.25, training={"guidance_range": [1, 8]})).save(path)
    header = files.header_of(path)
    tensors = {name: torch.zeros(part.shape, dtype=part.dtype) for name, part in header.tensors.items()}
    save_file(tensors, path, metadata={**header.metadata, **metadata})
    return path


def test_facts_are_those_of_the_file(tmp_path: Path):
    facts = adapter_facts(adapter(tmp_path / "a.safetensors"))
    assert (facts.base_model, facts.guidance_scale, facts.steps, facts.guidance_range) == ("Tiny", 4.0, 4, (1.0, 8.0))
    assert (facts.layers, facts.widths, facts.text_width, facts.dtype) == (2, (4, 6), 5, "float32")
    assert facts.parameters == sum(p.numel() for p in SunAdapter.load(tmp_path / "a.safetensors").parameters())
    assert facts.positive


@pytest.mark.parametrize(
    ("key", "value"),
    [("training", "[" * 10**5), ("training", "[]"), ("training", '{"guidance_range": "ab"}'),
     ("training", '{"guidance_range": [1]}'), ("training", '{"guidance_range": [8, 1]}'),
     ("training", '{"guidance_range": [true, 2]}'), ("training", '{"guidance_range": {"a": 1}}'),
     ("training", '{"guidance_range": [1e999, 2]}'), ("training", '{"loss": NaN}'), ("stage_length", "1e-320"),
     ("stage_length", "0"), ("stage_length", "2"), ("stage_length", "nan"), ("w", "1e308"), ("w", "inf"), ("w", "0"),
     ("normalized", "perhaps")],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_metadata_of_a_wrong_type_is_refused_by_every_surface(tmp_path: Path, key: str, value: str):
    path = adapter(tmp_path / "a.safetensors", **{key: value})
    for read in (files.peek, files.read, adapter_facts, describe):
        with pytest.raises(SunFileError, match=rf"a\.safetensors: .*{key}"):
            read(path)


def test_a_name_in_the_metadata_cannot_write_to_the_terminal(tmp_path: Path):
    path = adapter(tmp_path / "a.safetensors", base_model="\x1b]0;owned\x07\nerror: none" + "x" * 10_000)
    name = adapter_facts(path).base_model
    assert name is not None
    assert name.isprintable()
    assert len(name) < 250


def test_wrapped_names_are_those_of_the_adapter_inside(tmp_path: Path):
    """torch.compile and DataParallel put a prefix before every name; sorted as they are, layers would change places."""
    widths = (8,) * 16
    plain = SunAdapter(widths, 5)
    for layer, number in zip(plain.sun_layers(), range(16), strict=True):
        torch.nn.init.constant_(layer.alpha_neg, float(number))
    plain.save(tmp_path / "plain.safetensors")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "plain.safetensors")
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        save_file({prefix + name: part for name, part in tensors.items()}, tmp_path / "wrapped.safetensors")
        found = SunAdapter.load(tmp_path / "wrapped.safetensors")
        assert found.names == plain.names
        assert [float(layer.alpha_neg[0]) for layer in found.sun_layers()] == list(range(16))
    for prefix in ("unet.", "model."):
        save_file({prefix + name: part for name, part in tensors.items()}, tmp_path / "wrapped.safetensors")
        with pytest.raises(SunFileError, match="not a SUN adapter"):
            SunAdapter.load(tmp_path / "wrapped.safetensors")


def test_a_foreign_checkpoint_is_known_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with (tmp_path / "big.safetensors").open("wb") as handle:  # 40 GB that take no room
        size = 40 * 10**9
        header = json.dumps({"model.diffusion_model.x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
        handle.write(len(header).to_bytes(8, "little") + header.encode())
        handle.truncate(8 + len(header) + size)
    for read in (files.peek, files.read, adapter_facts, SunAdapter.load):
        with pytest.raises(SunFileError, match="not a SUN adapter"):
            read(tmp_path / "big.safetensors")
    assert describe(tmp_path / "big.safetensors")["kind"].startswith("not a SUN adapter: a Stable Diffusion")


def test_the_facts_of_many_adapters_load_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [adapter(tmp_path / f"{i}.safetensors") for i in range(5)]
    monkeypatch.setattr(files, "values_of", lambda *_: pytest.fail("the weights were read"))
    assert len([adapter_facts(path) for path in paths]) == 5


def test_pickles_are_refused_where_torch_cannot_read_them_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save({"1.to_k_neg.weight": torch.zeros(2, 2)}, tmp_path / "a.pt")
    for version in ("2.4.0", "2.5.1+cu121", "2.9.1", "1.13.1"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(SunFileError, match=r"before torch 2\.10"):
            files.read(tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    with pytest.raises(SunFileError, match="incomplete"):
        files.read(tmp_path / "a.pt")


def test_a_pickle_larger_than_any_adapter_is_not_loaded(tmp_path: Path):
    with (tmp_path / "model.ckpt").open("wb") as handle:
        handle.write(b"PK\x03\x04")
        handle.truncate(7 * 10**9)
    with pytest.raises(SunFileError, match="7,000,000,000 bytes"):
        files.peek(tmp_path / "model.ckpt")


# ---------------------------------------- mutated tables, settings

ODD = [None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**30, 1e300, "", "x", "\0", "\x1b[2J", "4", "nan", "../..", "[1",
       [], [[]], [1], ["x"], [None] * 3, {}, {"a": []}, {"1": [1.0]}, "x" * 10_000]  # fmt: skip


def mutate(content: Any, rng: random.Random) -> Any:
    """``content`` with something in it replaced, dropped, added or nested."""
    places = [(content, key) for key in content]
    places += [(inner, key) for inner in content.values() if isinstance(inner, dict) for key in inner]
    holder, key = rng.choice(places or [(content, "x")])
    kind = rng.choice(["set", "set", "set", "drop", "add", "deep"])
    if kind == "drop":
        holder.pop(key, None)
    elif kind == "add":
        holder[rng.choice(["x", "", "__class__", "steps", "\x1b"])] = copy.deepcopy(rng.choice(ODD))
    elif kind == "deep":
        value: Any = 1
        for _ in range(rng.choice([5, 70, 500])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        holder[key] = value
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return content


def damaged(text: str, rng: random.Random) -> bytes:
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        content[at : at + rng.choice([0, 1, 5])] = rng.choice([b"", b"\xff", b"\x00", b"NaN", b"9" * 5000, b"{", b'"'])
    return bytes(content)


def test_mutated_tables_are_read_or_refused_in_a_sentence(tmp_path: Path):
    rng, counts, sentences = random.Random(1), Counter[str](), set[str]()
    path = tmp_path / "t.json"
    key = LtcKey("abc", "euler", tuple(float(8 - i) for i in range(9)), 7.5)
    good = LtcTable(key, LtcSettings(), {5: (0.9,)}, (0.05,) * 7, 1.01, 3, True, {"a": "b"}).to_json()
    for number in range(MUTATIONS):
        content = json.loads(json.dumps(good))
        for _ in range(rng.choice([1, 1, 3])):
            content = mutate(content, rng)
        text = json.dumps(content)
        path.write_bytes(damaged(text, rng) if number % 3 == 0 else text.encode())
        try:
            table = load_table(path)
            counts["read"] += 1
            assert Path(table.key.file_name(table.settings)).name == table.key.file_name(table.settings)
            assert load_table(write_json(path, table.to_json())) == table
        except LtcError as error:
            counts["refused"] += 1
            sentences.add(str(error))
    print(MUTATIONS, "mutated tables:", dict(counts))
    assert counts["refused"] > MUTATIONS / 2
    assert counts["read"] > 20
    assert all(s.isprintable() and "t.json" in s and len(s) < 600 for s in sentences)


@dataclass
class Inner:
    lr: float = 1e-4
    steps: int = 5
    output: str = "runs"
    minutes: float | None = None


@dataclass
class Settings:
    model: str = "emoji"
    flag: bool = False
    names: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, 0.0)
    models: dict[str, Any] = field(default_factory=dict)
    where: Path = Path()
    run: Inner = field(default_factory=Inner)


def test_mutated_settings_are_read_or_refused_in_a_sentence(tmp_path: Path):
    rng, counts, sentences = random.Random(2), Counter[str](), set[str]()
    path = tmp_path / "s.json"
    good = {"model": "a", "flag": True, "names": ["a"], "pair": [1.0, 2.0], "run": {"lr": 1e-3, "steps": 7}}
    for number in range(MUTATIONS):
        content = json.loads(json.dumps(good))
        for _ in range(rng.choice([1, 1, 3])):
            content = mutate(content, rng)
        text = json.dumps(content)
        path.write_bytes(damaged(text, rng) if number % 3 == 0 else text.encode())
        try:
            config = apply(Settings(), read_config(path), "s.json")
            counts["read"] += 1
            assert isinstance(config.run.steps, int)
            assert isinstance(config.model, str)
        except ConfigError as error:
            counts["refused"] += 1
            sentences.add(str(error))
    print(MUTATIONS, "mutated settings:", dict(counts))
    assert counts["refused"] > MUTATIONS / 3
    assert counts["read"] > 100
    assert [s for s in sentences if "s.json" not in s or len(s) > 600] == []
    assert {s for s in sentences if not s.isprintable()} == set()


@pytest.mark.parametrize("value", [["a"], {"a": 1}, None, "a\0b"])
def test_a_text_is_a_text(value: Any):
    with pytest.raises(ConfigError, match="takes a text"):
        convert(value, str, "x")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_number_is_finite(value: str):
    with pytest.raises(ConfigError, match="takes a finite number"):
        convert(value, float, "x")


def test_deep_brackets_in_a_setting_are_refused():
    with pytest.raises(ConfigError):
        convert("[" * 10**4 + "1" + "]" * 10**4, tuple[float, ...], "x")
