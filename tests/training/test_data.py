"""Training data: what is read in which order by whom, what is skipped and counted, what stops a run."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sun.common.settings import ConfigError
from sun.training.data import tars
from sun.training.data.captioned import list_folder
from sun.training.data.negative_phrases import NegativePrompts
from sun.training.data.samples import DataError, Lanes, Order, Skipped, crop
from sun.training.data.shards import ShardSource, list_shards
from sun.training.data.sources import build_source
from sun.training.data.tars import read_samples

CPU = torch.device("cpu")


class PoolingVae:
    """Latents are the picture's mean colour per 8 x 8 pixels: quick, and it shows which picture was read."""

    config = SimpleNamespace(scaling_factor=1.0)
    encoder = torch.nn.Linear(1, 1)

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, pixels: Tensor) -> Any:
        self.calls += 1
        return SimpleNamespace(latents=F.pad(F.avg_pool2d(pixels, 8), (0, 0, 0, 0, 0, 1)))


def brightness(level: int) -> Image.Image:
    return Image.new("RGB", (16, 24), (level, level, level))


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    brightness(level).save(buffer, "PNG")
    return buffer.getvalue()


def levels(latents: Tensor) -> list[int]:
    return [round(v) for v in ((latents[:, 0].mean((1, 2)) + 1) * 127.5).tolist()]


def make_folder(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        brightness(10 * i).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"level {10 * i}")
    return folder


def make_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def make_shards(folder: Path, shards: int = 2, each: int = 3) -> str:
    for s in range(shards):
        numbers = range(s * each, (s + 1) * each)
        make_shard(
            folder / f"{s:03d}.tar",
            {f"{n:05d}": {"png": png(10 * n), "txt": f"level {10 * n}".encode()} for n in numbers},
        )
    return str(folder / f"{{000..{shards - 1:03d}}}.tar")


def source(data: Path | str, vae: Any = None, **settings: Any) -> Any:
    return build_source(str(data), vae or PoolingVae(), 16, random.Random(0), CPU, **settings)


def shard_source(data: str, lanes: Lanes = Lanes(), workers: int = 0) -> ShardSource:
    return ShardSource(list_shards(data), PoolingVae(), 16, CPU, 0, workers, lanes)


# --- order -----------------------------------------------------------------------------------------------------------


def test_an_order_visits_everything_once_a_pass_and_differently_each_time() -> None:
    order = Order(7, seed=1)
    first, second = [order[i] for i in range(7)], [order[i] for i in range(7, 14)]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert [Order(7, seed=1)[i] for i in range(14)] == first + second


def test_two_processes_read_what_one_process_with_two_micro_batches_reads() -> None:
    one = [Lanes(0, 1, 2).batch_number(call) for call in range(6)]
    two = [[Lanes(p, 2, 1).batch_number(call) for call in range(3)] for p in range(2)]
    assert one == [0, 1, 2, 3, 4, 5]
    assert sorted(two[0] + two[1]) == one
    assert [n for step in zip(*two, strict=True) for n in step] == one


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_gives_each_picture_with_its_caption_and_goes_on_where_it_stood(tmp_path: Path) -> None:
    folder = source(make_folder(tmp_path / "p", 6))
    drawn = [folder(2) for _ in range(2)]
    for latents, captions in drawn:
        assert [f"level {level}" for level in levels(latents)] == captions
    state = folder.state_dict()
    rest = [folder(2)[1] for _ in range(4)]
    assert {c for _, captions in drawn for c in captions} | set(rest[0]) == {f"level {10 * i}" for i in range(6)}
    resumed = source(tmp_path / "p")
    resumed.load_state_dict(state)
    assert [resumed(2)[1] for _ in range(4)] == rest


def test_unreadable_pictures_are_skipped_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "p", 4)
    (tmp_path / "p" / "01.png").write_bytes(b"not a picture")
    (tmp_path / "p" / "02.png").write_bytes(png(20)[:40])
    folder = source(tmp_path / "p")
    captions = {c for _ in range(6) for c in folder(2)[1]}
    assert captions == {"level 0", "level 30"}
    assert folder.skipped == {"unreadable pictures": 2}  # each once, however often it would have come
    assert "skipped 1 samples" in capsys.readouterr().out
    assert folder.state_dict()["skipped"] == {"unreadable pictures": 2}


def test_pictures_without_captions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "p", 3)
    (tmp_path / "p" / "01.txt").unlink()
    assert source(tmp_path / "p").skipped == {"pictures without a caption": 1}
    assert "01.png" in capsys.readouterr().out


def test_only_unreadable_pictures_stop_the_run(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", 2)
    for file in (tmp_path / "p").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 2 pictures"):
        source(tmp_path / "p")(1)


def test_an_empty_caption_stops_before_training(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", 3)
    (tmp_path / "p" / "02.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"1 of the 3 captions.*02\.png"):
        source(tmp_path / "p")


def test_pictures_that_the_metadata_lists_wrongly_stop_before_training(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", 1)
    metadata = tmp_path / "p" / "metadata.jsonl"
    metadata.write_text('{"file_name": "00.png", "text": "a"}\n{"file_name": "gone.png", "text": "b"}\n')
    with pytest.raises(DataError, match=r"1 of the 2 pictures.*gone\.png"):
        source(tmp_path / "p")
    metadata.write_text('{"file_name": "00.png", "text": "a"}\n{"file": "x"}\n')
    with pytest.raises(DataError, match="line 2"):
        source(tmp_path / "p")


def test_a_run_with_a_cache_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUN_CACHE", str(tmp_path / "cache"))
    cached = source(make_folder(tmp_path / "p", 4), cache="latents")
    cached(2)
    plain = source(tmp_path / "p")
    plain.load_state_dict(cached.state_dict())
    assert plain(1)[1]
    assert plain.calls == 2


def test_line_separators_and_marks_that_other_programs_write(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", 2)
    (tmp_path / "p" / "00.txt").write_text("a castle", encoding="utf-8-sig")
    assert list_folder(tmp_path / "p")[0][1] == "a castle"
    row = '{"file_name": "00.png", "text": "a castle\u2028on a hill"}'.replace("\\u2028", chr(0x2028))
    (tmp_path / "p" / "metadata.jsonl").write_text(row + "\r\n", encoding="utf-8-sig", newline="")
    assert list_folder(tmp_path / "p") == [(tmp_path / "p" / "00.png", f"a castle{chr(0x2028)}on a hill")]


def test_pictures_are_upright_on_white_and_of_full_depth() -> None:
    half = Image.new("RGB", (20, 20), "black")
    half.paste((255, 255, 255), (0, 0, 20, 10))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    stored = io.BytesIO()
    half.save(stored, "PNG", exif=exif)
    assert crop(Image.open(stored), 20).getpixel((10, 2)) == (0, 0, 0)
    assert crop(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), 8).getpixel((4, 4)) == (255, 255, 255)
    assert crop(Image.new("LA", (9, 9), (0, 128)), 8).getpixel((4, 4)) == (127, 127, 127)
    deep = io.BytesIO()
    Image.fromarray(np.full((9, 9), 20_000, dtype=np.uint16)).save(deep, "PNG")
    assert crop(Image.open(deep), 8).getpixel((4, 4)) == (78, 78, 78)


@pytest.mark.parametrize("size", [(1, 20_000), (30_000, 2), (7, 7)])
def test_a_thin_picture_is_cut_before_it_is_scaled(size: tuple[int, int]) -> None:
    """Scaled first, 1 x 20,000 would become 512 x 10,240,000."""
    assert crop(Image.new("RGB", size, "red"), 512).size == (512, 512)


def test_a_wrong_path_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        list_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="do not exist"):
        source(tmp_path / "{000..003}.tar")


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["many", "0", "-5"])
def test_a_wrong_number_of_scenes_says_how_to_write_it(count: str) -> None:
    with pytest.raises(ConfigError, match="emoji:fluent:2500"):
        build_source(f"emoji:twemoji:{count}", None, 64, random.Random(0), torch.device("cpu"))


def test_cached_latents_and_text_are_those_of_the_models_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUN_CACHE", str(tmp_path / "cache"))
    make_folder(tmp_path / "p", 5)
    (tmp_path / "p" / "03.png").write_bytes(b"broken")
    encoded: list[str] = []

    def encode(texts: list[str]) -> Tensor:
        encoded.extend(texts)
        return torch.tensor([[[float(len(t)), float(sum(map(ord, t)) % 97)]] * 3 for t in texts])

    vae = PoolingVae()
    cached = source(tmp_path / "p", vae, cache="latents+text", encode=encode)
    assert cached.skipped == {"unreadable pictures": 1}
    encode_cached, calls = cached.encoder(encode), vae.calls
    encoded.clear()
    for _ in range(4):
        latents, captions = cached(2)
        assert [f"level {level}" for level in levels(latents)] == captions
        texts = [captions[0], "blurry", captions[1]]
        assert torch.equal(encode_cached(texts), torch.cat([encode([t]) for t in texts]))
    assert vae.calls == calls  # training needs no autoencoder
    encoded.clear()
    again = source(tmp_path / "p", vae, cache="latents+text", encode=encode)
    assert vae.calls == calls
    assert len(encoded) == 1  # the probe that names the cache
    state = cached.state_dict()
    again.load_state_dict(state)
    assert again(3)[1] == cached(3)[1]


def test_shards_are_not_cached(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="streamed"):
        source(make_shards(tmp_path), cache="latents")
    with pytest.raises(ConfigError, match="latents"):
        source(tmp_path, cache="everything")


# --- shards ----------------------------------------------------------------------------------------------------------


def test_shards_give_every_good_sample_and_count_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, shards=2, each=2)
    make_shard(tmp_path / "002.tar", {
        "a": {"jpg": png(100), "json": b'{"caption": "level 100"}'},
        "b": {"jpg": b"not a picture", "txt": b"broken"},
        "c": {"jpg": png(0), "txt": b"  "},
        "d": {"txt": b"no picture"},
        "e": {"jpg": png(0)},
    })  # fmt: skip
    (tmp_path / "003.tar").write_bytes(b"this is no tar file" * 100)
    shards = shard_source(str(tmp_path))
    seen = [c for _ in range(5) for c in shards(1)[1]]
    assert sorted(seen) == ["level 0", "level 10", "level 100", "level 20", "level 30"]
    shards(5)  # into the next pass, so that everything was met
    assert set(shards.skipped) == {
        "unreadable shards or members", "unreadable pictures", "samples without a caption", "samples without a picture"
    }  # fmt: skip
    assert "skipped 1 samples" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_with_the_next_sample(tmp_path: Path, workers: int) -> None:
    data = make_shards(tmp_path, shards=4, each=3)
    whole = shard_source(data, workers=workers)
    before = [whole(3) for _ in range(3)]
    state = whole.state_dict()
    after = [whole(3)[1] for _ in range(6)]
    resumed = shard_source(data, workers=workers)
    resumed.load_state_dict(state)
    assert [resumed(3)[1] for _ in range(6)] == after
    first_pass = [c for _, captions in before for c in captions] + after[0]
    assert len(set(first_pass)) == 12


def test_each_process_streams_its_own_shards(tmp_path: Path) -> None:
    data = make_shards(tmp_path, shards=4, each=2)
    parts = [set(shard_source(data, Lanes(p, 2, 1))(4)[1]) for p in range(2)]
    assert len(parts[0]) == len(parts[1]) == 4
    assert not parts[0] & parts[1]
    with pytest.raises(DataError, match="5 processes"):
        shard_source(data, Lanes(0, 5, 1))


def test_an_empty_shard_stops_no_process(tmp_path: Path) -> None:
    """With a shard a process, one pass of somebody is empty now and then; the next brings another shard."""
    data = make_shards(tmp_path, shards=2, each=2)
    make_shard(tmp_path / "001.tar", {})
    for process in range(2):
        assert set(shard_source(data, Lanes(process, 2, 1))(12)[1]) == {"level 0", "level 10"}


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_usable_sample_stop_the_run(tmp_path: Path, workers: int) -> None:
    shard = make_shard(tmp_path / "x.tar", {"a": {"jpg": b"broken", "txt": b"a"}, "b": {"jpg": png(0), "txt": b""}})
    with pytest.raises(DataError, match=r"1 unreadable pictures.*1 samples without a caption|1 samples without.*1 un"):
        shard_source(shard, workers=workers)(1)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_skipped_samples_are_reported_at_powers_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    skipped = Skipped()
    for i in range(9):
        skipped.add("unreadable pictures", f"{i}.png")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1", "2", "4", "8"]
    assert "7.png" in lines[-1]


def test_a_list_of_negatives_without_a_phrase_stops(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no phrase"):
        NegativePrompts.load(str(tmp_path / "empty.txt"), "photos", 5, 0.0)


# --- captions that are none, and what is left out --------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["ein großer Bär".encode("latin-1"), "赤い猫".encode("cp932"), "a cat".encode("utf-16-le"), b"\x00\x01",
     b"a \xed\xa0\x80", "caf\ufffd".encode(), b"x" * 100_000],
)  # fmt: skip
def test_a_caption_that_is_no_text_stops_before_training(tmp_path: Path, content: bytes) -> None:
    make_folder(tmp_path / "p", 3)
    (tmp_path / "p" / "01.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"1 of the 3 captions.*01\.txt"):
        source(tmp_path / "p")


def test_a_caption_with_the_mark_of_its_encoding_is_read_in_it(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", 1)
    (tmp_path / "p" / "00.txt").write_text("ein Bär", encoding="utf-16")
    assert list_folder(tmp_path / "p")[0][1] == "ein Bär"
    row = '{"file_name": "00.png", "text": "ein Bär"}\n'
    (tmp_path / "p" / "metadata.jsonl").write_text(row, encoding="utf-16")
    assert list_folder(tmp_path / "p")[0][1] == "ein Bär"


@pytest.mark.parametrize(
    "text", ['["a cat", "two cats"]', "7", "true", "1.5", '{"en": "a cat"}', '"\\ud800"', '"a\\u0000b"', "[" * 100_000]
)
def test_metadata_whose_text_is_none_stops_before_training(tmp_path: Path, text: str) -> None:
    make_folder(tmp_path / "p", 2)
    good = '{"file_name": "00.png", "text": "a"}\n'
    (tmp_path / "p" / "metadata.jsonl").write_text(f'{good}{{"file_name": "01.png", "text": {text}}}\n')
    with pytest.raises(DataError, match="line 2 of"):
        source(tmp_path / "p")


@pytest.mark.parametrize("name", ['["00.png"]', "7", '""', "null"])
def test_metadata_without_a_file_name_stops_before_training(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path / "p", 1)
    (tmp_path / "p" / "metadata.jsonl").write_text(f'{{"file_name": {name}, "text": "a"}}\n')
    with pytest.raises(DataError, match="line 1 of"):
        source(tmp_path / "p")


def test_metadata_as_csv(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", 3)
    metadata = tmp_path / "p" / "metadata.csv"
    metadata.write_text(
        '\ufefffile_name,text,x\n00.png,"a castle, on a hill",1\n02.png,"two\nlines",2\n', encoding="utf-8"
    )
    folder = tmp_path / "p"
    assert list_folder(folder) == [(folder / "00.png", "a castle, on a hill"), (folder / "02.png", "two\nlines")]
    assert source(folder).skipped == {"pictures that metadata.csv does not list": 1}
    head = "file_name,text\n"
    for wrong, match in ((f"{head}00.png\n", "empty"), (f"{head}00.png,a,b\n", "more columns"),
                         ("name,text\n00.png,a\n", "line 2"), (f"{head}00.png,\x01\n", r"U\+0001")):  # fmt: skip
        metadata.write_text(wrong)
        with pytest.raises(DataError, match=match):
            source(folder)


@pytest.mark.parametrize(
    "files",
    [{"json": b'{"caption": ["a cat", "two cats"]}'}, {"json": b'{"caption": 7}'}, {"json": b"[" * 200_000},
     {"json": b'{"text": {"en": "cat"}}'}, {"json": b"[1]"}, {"txt": "Bär".encode("latin-1")},
     {"txt": "cat".encode("utf-16-le")}, {"json": b'{"caption": "\\ud800"}'}, {"txt": b"x" * 100_000}],
)  # fmt: skip
def test_captions_of_shards_that_are_no_text_are_skipped_and_counted(tmp_path: Path, files: dict[str, bytes]) -> None:
    samples = {"a": {"png": png(0), "txt": b"level 0"}, "b": {"png": png(10), **files}}
    shards = shard_source(make_shard(tmp_path / "x.tar", samples))
    assert set(shards(4)[1]) == {"level 0"}
    assert set(shards.skipped) == {"captions that are no text"}


def test_files_that_are_left_out_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "p", 1)
    for suffix, kind in (("jfif", "JPEG"), ("tif", "TIFF"), ("gif", "GIF")):
        brightness(90).save(folder / f"{suffix}.{suffix}", kind)
        (folder / f"{suffix}.txt").write_text("level 90")
    (folder / "x.avif").write_bytes(b"x")
    (folder / "x.psd").write_bytes(b"x")
    (folder / "words.txt").write_text("no picture")
    (folder / "more.zip").write_bytes(b"x")
    (folder / "below").mkdir()
    make_shard(folder / "below" / "0.tar", {})
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    read = source(folder)
    assert read.skipped == {
        "pictures of a kind that is not read (.avif)": 1, "pictures of a kind that is not read (.psd)": 1,
        "captions without a picture": 1, "archives": 1, "shards in subfolders": 1,
        "pictures that are no regular files": 2,
    }  # fmt: skip
    assert sorted(set(read(8)[1])) == ["level 0", "level 90"]
    assert read.skipped.total() == 7
    assert "is not read" in capsys.readouterr().out


def test_pictures_beside_shards_are_counted_and_named(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    make_shards(tmp_path, shards=1, each=2)
    (tmp_path / "more").mkdir()
    make_shard(tmp_path / "more" / "1.tar", {})
    shards = source(tmp_path)
    assert shards.skipped == {"pictures beside shards": 2, "shards in subfolders": 1}
    assert shards(2)[1]
    assert shards.skipped["pictures beside shards"] == 2


# --- what a stranger's data may not do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    ["pipe:touch {mark}; cat /dev/null #.tar", "PIPE:touch {mark} #.tar", "a.tar::pipe:touch {mark} #.tar",
     "pi{{pe,xe}}:touch {mark} #.tar", " pipe:touch {mark} #.tar"],
)  # fmt: skip
def test_a_command_runs_only_where_it_is_allowed(tmp_path: Path, data: str) -> None:
    mark = tmp_path / "RAN"
    with pytest.raises((ConfigError, FileNotFoundError)):
        source(data.format(mark=mark))(1)
    assert not mark.exists()


def test_a_command_that_is_allowed_gives_a_shard(tmp_path: Path) -> None:
    make_shards(tmp_path, shards=1, each=2)
    assert source(f"pipe:cat {tmp_path / '000.tar'}", allow_commands=True)(2)[1]


@pytest.mark.parametrize(
    "address",
    ["https://x/'; touch {mark}; '.tar", "https://x/$(touch {mark}).tar ", "file://{mark}", "ssh://x/a.tar",
     "https://x/`touch {mark}`.tar", "gopen://x.tar"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(DataError, match="not an address of a shard"):
        list_shards(address.format(mark=tmp_path / "RAN"))
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("data", ["{0..99999999999}.tar", "{a,b}" * 40 + ".tar", "{0..999}{0..999}{0..999}.tar"])
def test_a_range_without_end_is_refused(data: str) -> None:
    with pytest.raises(DataError, match="more than 1,000,000 shards"):
        list_shards(data)


def test_a_pipe_or_a_folder_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    (tmp_path / "1.tar").mkdir()
    for data in ("0.tar", "1.tar"):
        with pytest.raises(FileNotFoundError):
            list_shards(str(tmp_path / data))


def bomb(kind: str) -> bytes:
    """A tar file of a few kilobytes, compressed, whose member or header is four times as long as is read of one."""
    size = 4 * tars.MAX_MEMBER
    info = tarfile.TarInfo("b.jpg" if kind != "other" else "b.bin")
    info.size = size
    if kind == "header":
        info.type, info.name = tarfile.XHDTYPE, "PaxHeader"
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as out:
        good = io.BytesIO()
        with tarfile.open(fileobj=good, mode="w") as tar:
            for suffix, data in (("png", png(10)), ("txt", b"level 10")):
                member = tarfile.TarInfo(f"a.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        out.write(good.getvalue()[: 4 * tarfile.BLOCKSIZE])  # two headers with their contents, without the end
        out.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(size // 2**20):
            out.write(bytes(2**20))
    return packed.getvalue()


@pytest.mark.parametrize("kind", ["picture", "other", "header"])
def test_a_small_file_that_unpacks_to_a_large_one_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tars, "MAX_MEMBER", 4 * 2**20)
    (tmp_path / "x.tar").write_bytes(bomb(kind))
    assert (tmp_path / "x.tar").stat().st_size < 200_000
    shards = shard_source(str(tmp_path / "x.tar"))
    tracemalloc.start()
    try:
        assert shards(1)[1] == ["level 10"]
        shards(1)
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()
    assert shards.skipped["unreadable shards or members"] >= 1


def test_samples_wait_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_BUFFER_BYTES", 8 * 2**20)
    samples = (tars.RawSample(str(i), str(i), {"jpg": bytes(10)}) for i in range(2000))
    shuffled = list(tars.shuffled(samples, random.Random(0)))
    assert sorted(int(s.key) for s in shuffled) == list(range(2000))
    assert [int(s.key) for s in shuffled] != list(range(2000))
    waiting: list[int] = []
    big = (waiting.append(i) or tars.RawSample(str(i), str(i), {"jpg": bytes(2**20)}) for i in range(1000))
    next(tars.shuffled(big, random.Random(0)))
    assert len(waiting) <= 9


@pytest.mark.parametrize("how", ["cut", "empty", "text", "other", "pipe", "link"])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    monkeypatch.setenv("SUN_CACHE", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "p", 4)
    right = source(folder, cache="latents")(4)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    content = file.read_bytes()
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "link":
        file.symlink_to(tmp_path / "nowhere")
    elif how == "other":
        save_file({"index": torch.tensor([0, 9]), "latents": torch.zeros(2, 4, 2, 2)}, file)
    else:
        file.write_bytes({"cut": content[:-9], "empty": b"", "text": b"not a cache"}[how])
    again = source(folder, cache="latents")(4)
    assert again[1] == right[1]
    assert torch.equal(again[0], right[0])
    assert "made again" in capsys.readouterr().out


def test_a_cache_with_infinite_latents_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUN_CACHE", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "p", 2)
    source(folder, cache="latents")
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    save_file({"index": torch.arange(2), "latents": torch.full((2, 4, 2, 2), torch.inf).half()}, file)
    with pytest.raises(DataError, match="NaN or infinity"):
        source(folder, cache="latents")(1)


OUTSIDE = ["/etc/hostname.png", "../secret.png", "a/../../secret.png", "C:\\secret.png", "..\\secret.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_list_of_captions_reads_no_picture_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a cat"}) + "\n")
    with pytest.raises(DataError, match="outside of"):
        list_folder(folder)


def test_a_shard_that_is_damaged_or_cut_off_in_the_middle_is_counted(tmp_path: Path) -> None:
    files = {"png": png(10), "txt": b"level 10"}
    whole = Path(make_shard(tmp_path / "whole.tar", {f"{n}": files for n in range(5)})).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        third = tar.getmembers()[4].offset
    bad = {
        "header": whole[:third] + b"xyz" + whole[third + 3 :],
        "cut at a member": whole[:third],
        "cut in a header": whole[: third + 100],
    }
    for name, content in bad.items():
        (tmp_path / "x.tar").write_bytes(content)
        skipped = Skipped()
        assert len(list(read_samples(str(tmp_path / "x.tar"), skipped))) == 2, name
        assert skipped == {"unreadable shards or members": 1}, name
    skipped = Skipped()
    assert len(list(read_samples(str(tmp_path / "whole.tar"), skipped))) == 5
    assert not skipped
    packed = bytearray(gzip.compress(whole, 0))
    for place in range(100, len(packed) - 100, 977):
        damaged = packed.copy()
        damaged[place : place + 64] = b"\xff" * 64
        (tmp_path / "x.tar").write_bytes(damaged)
        list(read_samples(str(tmp_path / "x.tar"), Skipped()))  # whatever is read, nothing else is raised
