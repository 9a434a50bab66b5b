"""Emoji artwork and names, fetched by package name through the npm client.

Every style is one published package; of its pictures none is bundled with this project. Licences are recorded in
``STYLES`` and repeated in the model cards of whatever is trained on them. ``vocabulary.json`` holds names and codes of
the emoji that are used by default, from the package ``emoji-datasource`` (MIT).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ...common.cache import cache_dir
from ...common.settings import ConfigError
from ...user_pictures import open_picture

METADATA_PACKAGE = "emoji-datasource@16.0.0"
VOCABULARIES = ("everyday", "wide", "all")
VOCABULARY_FILE = Path(__file__).parent / "vocabulary.json"


@dataclass(frozen=True)
class Style:
    """One emoji style: where its pictures are inside which package, and under which licence.

    Either one file an emoji, ``folder/CODE.suffix``, or all of them by name in an Iconify set, ``folder/icons.json``.
    """

    name: str
    package: str
    folder: str
    suffix: str
    licence: str
    attribution: str


STYLES = {
    s.name: s
    for s in (
        Style(
            "twemoji",
            "@twemoji/svg@15.0.0",
            "package",
            "svg",
            "CC-BY 4.0 (graphics), MIT (package)",
            "Twemoji by Twitter, Inc. and contributors (jdecked/twemoji)",
        ),
        Style(
            "openmoji",
            "openmoji@17.0.0",
            "package/color/svg",
            "svg",
            "CC-BY-SA 4.0",
            "OpenMoji, the open-source emoji and icon project (HfG Schwaebisch Gmuend)",
        ),
        Style(
            "fluent",
            "@lobehub/fluent-emoji-flat@1.1.0",
            "package/assets",
            "svg",
            "MIT",
            "Fluent Emoji by Microsoft, packaged by LobeHub",
        ),
        Style(
            "google",
            "emoji-datasource-google@16.0.0",
            "package/img/google/64",
            "png",
            "Apache-2.0 (artwork)",
            "Noto Emoji by Google, packaged by emoji-data",
        ),
        Style(
            "blob",
            "@iconify-json/noto-v1@1.2.5",
            "package",
            "json",
            "Apache-2.0",
            "Noto Emoji before 2017 (blobs) by Google, packaged by Iconify",
        ),
        Style(
            "streamline",
            "@iconify-json/streamline-emojis@1.2.4",
            "package",
            "json",
            "CC-BY 4.0",
            "Streamline Emojis by Streamline, packaged by Iconify",
        ),
    )
}


@dataclass(frozen=True)
class Emoji:
    """Name, aliases and category of one emoji; ``code`` is its lower-case code point sequence."""

    code: str
    name: str
    aliases: tuple[str, ...]
    category: str
    subcategory: str


# Flags, letters and keycaps are tables to memorise rather than pictures to compose; families repeat persons.
_SKIPPED_CATEGORIES = {"Flags", "Component"}
_SKIPPED_SUBCATEGORIES = {"alphanum", "keycap", "family", "country-flag", "subdivision-flag", "gender", "time"}
_GENDERED = re.compile(r"^(man|woman|women|men|male|female)[-_ ]")


def fetch_package(spec: str) -> Path:
    """Path of the ``.tgz`` of an npm package such as ``openmoji@17.0.0``, downloaded once.

    Raises ConfigError naming the missing tool or the failed command.
    """
    folder = cache_dir() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = spec.rpartition("@")
    target = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if target.exists():
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(f"npm is needed to download the emoji package {spec}: install Node.js, then run this again.")
    with tempfile.TemporaryDirectory(dir=folder) as part:  # an interruption, or another process, leaves no half file
        done = subprocess.run([npm, "pack", spec, "--silent"], cwd=part, capture_output=True, text=True)
        if done.returncode != 0 or not (Path(part) / target.name).exists():
            raise ConfigError(f"`npm pack {spec}` failed in {folder}:\n{done.stderr.strip() or done.stdout.strip()}")
        os.replace(Path(part) / target.name, target)
    return target


def _clean(name: str) -> str:
    words = re.sub(r"[^a-z0-9+ ]", " ", name.lower().replace("_", " ").replace("-", " ").replace("’", ""))
    return " ".join(words.split())


def _keys(code: str) -> list[str]:
    """Spellings of a code point sequence that the packages use in file names."""
    bare = code.replace("-fe0f", "")
    stripped = ["-".join(part.lstrip("0") for part in c.split("-")) for c in (code, bare)]
    return [code, bare, *stripped]


def _unambiguous(emojis: list[Emoji]) -> list[Emoji]:
    """Without aliases that are also another emoji's name or alias."""
    uses = Counter(n for e in emojis for n in {e.name, *e.aliases})
    return [replace(e, aliases=tuple(a for a in e.aliases if uses[a] == 1 and a != e.name)) for e in emojis]


def load_metadata(vocabulary: str = "everyday") -> list[Emoji]:
    """The emoji this project trains on, in Unicode order.

    ``vocabulary``: ``everyday`` (about 120 things recognised at a glance) or ``wide`` (about 270), both listed in
    ``vocabulary.json``, or ``all`` (about 1,300, from a package; flags, letters and persons that differ by gender or
    skin alone left out). Raises ConfigError.
    """
    if vocabulary not in VOCABULARIES:
        raise ConfigError(f"the vocabulary (emojis) is one of {', '.join(VOCABULARIES)}, not {vocabulary!r}.")
    listed = json.loads(VOCABULARY_FILE.read_text(encoding="utf-8"))
    if vocabulary != "all":
        chosen = [row for row in listed if vocabulary == "wide" or row["everyday"]]
        return _unambiguous([_emoji(row) for row in chosen])
    with tarfile.open(fetch_package(METADATA_PACKAGE)) as tar:
        member = tar.extractfile("package/emoji.json")
        assert member is not None
        rows = json.load(member)
    names = {row["code"]: row["name"] for row in listed}
    found = []
    for row in sorted(rows, key=lambda r: r["sort_order"]):
        if row["category"] in _SKIPPED_CATEGORIES or row["subcategory"] in _SKIPPED_SUBCATEGORIES:
            continue
        if row["category"] == "People & Body" and _GENDERED.match(row["short_name"]):
            continue
        code = row["unified"].lower()
        aliases = tuple(dict.fromkeys(_clean(a) for a in row["short_names"]))
        found.append(Emoji(code, names.get(code, _clean(row["name"])), aliases, row["category"], row["subcategory"]))
    return _unambiguous(found)


def _emoji(row: dict[str, Any]) -> Emoji:
    return Emoji(row["code"], row["name"], tuple(row["aliases"]), row["category"], row["subcategory"])


def check_style(style: str) -> None:
    """Raise ConfigError for a name that is none of the styles."""
    if style not in STYLES:
        raise ConfigError(f"style takes {', '.join(STYLES)}, not {style!r}.")


def load_pictures(style: str, emojis: list[Emoji], size: int = 128) -> dict[str, Image.Image]:
    """RGBA pictures of ``size`` x ``size`` pixels by emoji code, for every emoji the style has. Raises ConfigError."""
    check_style(style)
    spec = STYLES[style]
    if spec.suffix == "json":
        return _iconify_pictures(spec, emojis, size)
    pictures: dict[str, Image.Image] = {}
    wanted = {f"{spec.folder}/{key}.{spec.suffix}".lower(): e.code for e in emojis for key in _keys(e.code)}
    with tarfile.open(fetch_package(spec.package)) as tar:
        for member in tar:
            code = wanted.get(member.name.lower())
            if code is None or code in pictures:
                continue
            handle = tar.extractfile(member)
            assert handle is not None
            pictures[code] = _rasterise(handle.read(), spec.suffix, size)
    return pictures


def _iconify_pictures(spec: Style, emojis: list[Emoji], size: int) -> dict[str, Image.Image]:
    """Those of the emojis whose name, or one of whose aliases, an Iconify set has."""
    with tarfile.open(fetch_package(spec.package)) as tar:
        handle = tar.extractfile(f"{spec.folder}/icons.json")
        assert handle is not None
        found = json.load(handle)
    icons = found["icons"]
    named = {name: name for name in icons} | {name: row["parent"] for name, row in found.get("aliases", {}).items()}
    named = {name.replace("-", ""): target for name, target in named.items() if target in icons}
    pictures = {}
    for emoji in emojis:
        spelled = (name.replace(" ", "") for name in (emoji.name, *emoji.aliases))
        icon = next((icons[named[name]] for name in spelled if name in named), None)
        if icon is not None:
            left, top, width, height = (
                icon.get(key, found.get(key, default))
                for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
            )
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
            )
            pictures[emoji.code] = _rasterise(svg.encode(), "svg", size)
    return pictures


def _rasterise(data: bytes, suffix: str, size: int) -> Image.Image:
    if suffix == "svg":
        try:
            import resvg_py
        except ModuleNotFoundError as error:
            raise ConfigError('drawing SVG needs resvg_py. In a clone: pip install -e ".[emoji]"') from error
        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=size, height=size))
    image = open_picture(data).convert("RGBA")
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)
