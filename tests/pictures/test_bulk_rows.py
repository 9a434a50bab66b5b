"""Files of prompts: what their rows say, which are none, and that a long file is read by offsets."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sun.common.reading import ReadError
from sun.pictures.bulk import prompts_file
from sun.pictures.bulk.prompts_file import PromptsFile
from sun.pictures.bulk.rows import Failure, Row
from sun.pictures.bulk.run import parsed
from sun.pictures.recipe import Recipe

BASE = Recipe(seed=100, steps=4, negative="blurry")


def read(path: Path, content: str | bytes, every: int = 1000) -> PromptsFile:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return PromptsFile.read(path, every)


def rows(prompts: PromptsFile, base: Recipe = BASE) -> list[Row | Failure]:
    return list(parsed(prompts, base, 0, len(prompts)))


def reasons(found: list[Row | Failure]) -> dict[int, str]:
    return {row.line: row.reason for row in found if isinstance(row, Failure)}


def recipes(found: list[Row | Failure]) -> list[Recipe]:
    return [row.recipe for row in found if isinstance(row, Row)]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    prompts = read(tmp_path / "x.txt", '\ufeff a cat, with "quotes"\r\n\r\na dog | x\n\n猫\u2028 \r\na dog | x')
    found = rows(prompts)
    assert [row.line for row in found] == [1, 3, 5, 6]
    assert [r.prompt for r in recipes(found)] == ['a cat, with "quotes"', "a dog | x", "猫", "a dog | x"]
    assert [r.seed for r in recipes(found)] == [100, 101, 102, 103]
    assert {r.negative for r in recipes(found)} == {"blurry"}
    assert (prompts.contents.blank, prompts.contents.repeated, prompts.contents.first_repeated) == (2, 1, (3,))


def test_a_csv_file_has_columns_quotes_and_lines_inside_of_texts(tmp_path: Path) -> None:
    content = (
        '\ufeffprompt,Negative,seed,size,steps,guidance\r\n"a ""big"" cat,\r\nred",,7,512x768,8,2.5\r\n'
        'a 5" disk,none,,,,\r\n\r\n"x" y,"",18446744073709551615,64,2.0,\r\n'
    )
    found = rows(read(tmp_path / "x.csv", content))
    first, second, third = recipes(found)
    assert [row.line for row in found] == [2, 4, 6]
    assert (first.prompt, first.negative, first.seed) == ('a "big" cat,\r\nred', "blurry", 7)
    assert (first.width, first.height, first.steps, first.guidance) == (512, 768, 8, 2.5)
    assert (second.prompt, second.negative, second.seed, second.steps) == ('a 5" disk', "none", 101, 4)
    assert (third.prompt, third.seed, third.width, third.height, third.steps) == ("x y", 2**64 - 1, 64, 64, 2)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_delimiters_are_found(tmp_path: Path, mark: str) -> None:
    content = f"negative{mark}prompt\nx, y{mark}a, b\n"
    assert [(r.prompt, r.negative) for r in recipes(rows(read(tmp_path / "x.tsv", content)))] == [("a, b", "x, y")]


def test_json_lines_take_numbers_and_texts(tmp_path: Path) -> None:
    content = (
        '{"prompt": "a", "width": 64, "height": "128", "seed": 5, "strength": 0.5, "init": "i.png", "id": [1]}\n'
        '{"prompt": "b", "seed": null, "size": 64, "negative": "", "guidance": "3"}\n'
    )
    first, second = recipes(rows(read(tmp_path / "x.jsonl", content)))
    assert (first.width, first.height, first.seed, first.strength, first.init) == (64, 128, 5, 0.5, "i.png")
    assert (second.seed, second.width, second.negative, second.guidance) == (101, 64, "blurry", 3.0)


def test_bad_rows_are_told_by_line_and_the_others_kept(tmp_path: Path) -> None:
    bad: list[tuple[Any, str]] = [
        ('{"prompt": "a", "seed": -1}', "seed"),
        ('{"prompt": "a", "seed": 1.5}', "whole number"),
        ('{"prompt": "a", "seed": true}', "seed"),
        ('{"prompt": "a", "steps": 5000}', "steps"),
        ('{"prompt": "a", "size": "500"}', "multiples of 8"),
        ('{"prompt": "a", "size": "big"}', "not a size"),
        ('{"prompt": "a", "size": "64", "width": 128}', "different"),
        ('{"prompt": "a", "width": 128}', "both sides"),
        ('{"prompt": "a", "width": 8000, "height": 8000}', "width"),
        ('{"prompt": "a", "guidance": "nan"}', "guidance"),
        ('{"prompt": "a", "scheduler": "magic"}', "scheduler"),
        ('{"prompt": "a", "init": "//server/x.png"}', "another machine"),
        ('{"prompt": "a", "negativ": "b"}', "negative"),
        ('{"prompt": "a", "negative_prompt": "b"}', "negative"),
        ('{"prompt": ["a"]}', "no text"),
        ('{"prompt": " "}', "no prompt"),
        ('{"prompt": "a\\u0000"}', "characters"),
        ('{"prompt": "\\ud800"}', "characters"),
        ('"a"', "object"),
        ("[" * 5000, "nested"),
        ('{"prompt": "a"', "JSON"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "digits"),
        (b'{"prompt": "\xff"}', "UTF-8"),
    ]  # fmt: skip
    lines = [
        b'{"prompt": "good"}',
        *(line if isinstance(line, bytes) else line.encode() for line, _ in bad),
        b'{"prompt": "z"}',
    ]
    found = rows(read(tmp_path / "x.jsonl", b"\n".join(lines)))
    assert [r.prompt for r in recipes(found)] == ["good", "z"]
    told = reasons(found)
    assert list(told) == list(range(2, len(bad) + 2))
    for (_, word), reason in zip(bad, told.values(), strict=True):
        assert word in reason


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", "[]", "jsonl"),
        ("x", "a", ".txt"),
        ("x.txt", "", "no prompts"),
        ("x.txt", "\n \n", "no prompts"),
        ("x.csv", "prompt,seed\n", "no prompts"),
        ("x.csv", "a cat\na dog\n", "no column prompt"),
        ("x.csv", "prompt,seed,seed\na,1,2\n", "twice"),
        ("x.csv", "prompt,negativ\na,b\n", "negative"),
        ("x.csv", "caption\na\n", "prompt"),
        ("x.csv", 'prompt\n"a\n' + "b\n" * 2000, "line 2"),
        ("x.txt", "a\rb\rc\r", "old Macs"),
        ("x.txt", "a\nb".encode("utf-16"), "UTF-8"),
        ("x.txt", "a" * (2**20 + 1), "longer than"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused_in_a_sentence(
    tmp_path: Path, name: str, content: Any, words: str
) -> None:
    with pytest.raises(ReadError, match=words):
        read(tmp_path / name, content)


def test_cells_too_many_or_too_few_are_a_bad_row(tmp_path: Path) -> None:
    found = rows(read(tmp_path / "x.csv", "prompt,seed\na, b,1\na\na,1\n"))
    assert list(reasons(found)) == [2, 3]
    assert "3 values for 2 columns" in reasons(found)[2]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=st.lists(st.tuples(*[st.text('ab",;\n\r x', max_size=8)] * 2), min_size=1, max_size=12))
def test_what_csv_writes_is_read_back_from_any_row_on(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    import csv

    path = tmp_path / "x.csv"
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([("prompt", "negative"), *(("p" + a, b) for a, b in cells)])
    prompts = PromptsFile.read(path, 3)
    assert len(prompts) == len(cells)
    for first in range(len(cells)):
        read = [prompts.form.values(raw) for _, _, raw in prompts.rows(first, len(cells))]
        assert [(row["prompt"], row["negative"]) for row in read] == [("p" + a, b) for a, b in cells[first:]]


def test_a_long_file_is_never_in_memory_and_its_places_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_file, "COMPARED", 1000)
    path = tmp_path / "x.txt"
    with path.open("w") as handle:
        for block in range(25):
            handle.writelines(f"prompt {block * 2000 + i} {'x' * 100}\n" for i in range(2000))
    size = path.stat().st_size
    tracemalloc.start()
    prompts = PromptsFile.read(path, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(prompts) == 50_000
    assert peak < size / 2  # 2 MiB of buffers; the file has 6 MB
    assert next(prompts.rows(43_456, 43_457))[1:] == (43_457, f"prompt 43456 {'x' * 100}\n".encode())
    prompts.keep(tmp_path / "index.npz")
    known = PromptsFile.known(path, tmp_path / "index.npz", 1000)
    assert known is not None
    assert known.contents == prompts.contents
    assert list(known.rows(49_998, 300_000)) == list(prompts.rows(49_998, 300_000)) != []
    assert PromptsFile.known(path, tmp_path / "index.npz", 500) is None
    with path.open("a") as handle:
        handle.write("more\n")
    assert PromptsFile.known(path, tmp_path / "index.npz", 1000) is None
    with pytest.raises(ReadError, match="changed during the run"):
        list(prompts.rows(0, 1))


def test_damaged_places_are_found_anew(tmp_path: Path) -> None:
    prompts = read(tmp_path / "x.txt", "a\nb\n")
    index = tmp_path / "index.npz"
    prompts.keep(index)
    whole = index.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"x" * 100,
        whole.replace("stamp".encode("utf-32-le"), "stomp".encode("utf-32-le")),
    ):
        index.write_bytes(damaged)
        assert PromptsFile.known(tmp_path / "x.txt", index, 1000) is None
