"""What a U-Net of the SD family is made of, what may be removed from it, and what is left then.

Everything follows from the diffusers configuration: no weights, no host. A stage of ``n`` layers on the way down has
``n + 1`` on the way up. Whatever is removed here leaves that rule whole, so the result is an ordinary U-Net of the
family for every loader (A-SDM's "model assembly", arXiv 2406.00210; the paper's body was not available, so the choice
of candidates is a reconstruction, with the lists of BK-SDM, arXiv 2305.15798, as published).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..common.reading import printable

_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
_NAME = re.compile(r"(pair|transformers|depth)\.(\d{1,2})(?:\.(\d{1,3}))?|mid|innermost")
LISTS = ("shallow", "bk-base", "bk-small", "bk-tiny")
"""Named choices. ``shallow``: one pair of layers of each of the two finest stages and of their mirrors, where time is
spent and few weights live. (D1, D2 and U4 alone, without U3, would be no ordinary U-Net: a stage and its mirror have n
and n + 1 layers.) The others are BK-SDM's."""


class CompactError(ValueError):
    """A U-Net, plan or setting that cannot be used; the message says why and what can."""


@dataclass(frozen=True)
class Shape:
    """The structure of a U-Net: widths, layers, cross-attention and transformer depth of each stage, finest first.

    depths: transformer blocks in each attention of a stage (0 where it has none). mid_depth: the same for the middle;
    -1: there is no middle. text_width: of the text states. channels: of input and output.
    """

    widths: tuple[int, ...]
    layers: tuple[int, ...]
    depths: tuple[int, ...]
    mid_depth: int
    text_width: int
    channels: tuple[int, int]
    linear: bool = False
    added: int = 0
    """Width of SDXL's additional embedding; 0: none."""

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.widths)

    def as_json(self) -> dict[str, Any]:
        """As :meth:`from_json` reads it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def difference(self, other: Shape) -> tuple[str, Any, Any] | None:
        """The first field that differs, as it is here and there; None for the same shape."""
        mine, theirs = self.as_json(), other.as_json()
        return next(((key, mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]), None)

    @classmethod
    def from_json(cls, content: Any, where: str) -> Shape:
        """The shape a plan's file states. Raises CompactError naming ``where``."""
        names = {f.name for f in fields(cls)}
        if not isinstance(content, Mapping) or not {*content} <= names or not names - {"linear", "added"} <= {*content}:
            raise CompactError(f"{where} does not describe its U-Net ({', '.join(sorted(names))}). Make it again.")
        for key, value in content.items():
            if key == "linear":
                if not isinstance(value, bool):
                    raise CompactError(f"{where} gives linear as {_shown(value)}, not true or false. Make it again.")
                continue
            numbers = value if key in _LISTED else [value]
            low, high = _BOUNDS[key]
            if not isinstance(numbers, list) or not 0 < len(numbers) <= MOST_STAGES:
                raise CompactError(f"{where} gives {key} as {_shown(value)}, no list of stages. Make it again.")
            if not all(type(n) is int and low <= n <= high for n in numbers):
                raise CompactError(
                    f"{where} gives {key} as {_shown(value)}, not whole numbers from {low} to {high}. Make it again."
                )
        own: dict[str, Any] = {key: tuple(value) if key in _LISTED else value for key, value in content.items()}
        shape = cls(**own)
        if not len(shape.widths) == len(shape.layers) == len(shape.depths) or len(shape.channels) != 2:
            raise CompactError(f"{where} names different numbers of stages. Make it again.")
        return shape


MOST_STAGES = 8
_LISTED = ("widths", "layers", "depths", "channels")
# Far above the largest of the family; what is to be removed is spelled out name by name.
_BOUNDS = {
    "widths": (1, 2**16),
    "layers": (1, 32),
    "depths": (0, 64),
    "mid_depth": (-1, 64),
    "text_width": (1, 2**16),
    "channels": (1, 2**10),
    "added": (0, 2**16),
}


def _shown(value: Any) -> str:
    """What a stranger's file says, fit for one line."""
    text = printable(repr(value))
    return text if len(text) <= 60 else text[:60] + "..."


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape of a ``UNet2DConditionModel`` by its configuration. Raises CompactError for another kind of U-Net."""
    down, up = list(config.get("down_block_types", ())), list(config.get("up_block_types", ()))
    known = all(kind in _DOWN for kind in down) and all(kind in _UP for kind in up)
    if not down or not known or [_DOWN[d] for d in down] != [_UP[u] for u in reversed(up)]:
        raise CompactError(
            f"A U-Net with stages {', '.join(map(str, down)) or 'of an unknown kind'} is not of the Stable Diffusion "
            "family; model assembly knows SD 1.x, 2.x and SDXL."
        )
    if config.get("class_embed_type") or config.get("encoder_hid_dim") or config.get("num_class_embeds"):
        raise CompactError("This U-Net takes further inputs than texts; model assembly knows SD 1.x, 2.x and SDXL.")
    count, depth = len(down), config.get("transformer_layers_per_block", 1)
    if config.get("reverse_transformer_layers_per_block") or any(
        not isinstance(d, int) for d in (depth if isinstance(depth, (list, tuple)) else [depth])
    ):
        raise CompactError("This U-Net's way up has other transformers than its way down; assembly needs them alike.")
    depths = _each(depth, count, "transformer_layers_per_block")
    mid = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if mid not in (None, "UNetMidBlock2DCrossAttn"):
        raise CompactError(f"This U-Net has a middle of the kind {mid}; the family has cross-attention there or none.")
    return Shape(
        widths=tuple(config["block_out_channels"]),
        layers=_each(config.get("layers_per_block", 2), count, "layers_per_block"),
        depths=tuple(d if _DOWN[kind] else 0 for d, kind in zip(depths, down, strict=True)),
        mid_depth=-1 if mid is None else depths[-1],
        text_width=_each(config.get("cross_attention_dim", 0), 1, "cross_attention_dim")[0],
        channels=(config["in_channels"], config["out_channels"]),
        linear=bool(config.get("use_linear_projection", False)),
        added=int(config.get("projection_class_embeddings_input_dim") or 0),
    )


def _each(value: Any, count: int, name: str) -> tuple[int, ...]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count and name != "cross_attention_dim":
        raise CompactError(f"{name} is {value} for {count} stages.")
    return tuple(int(v) for v in values)


def candidates(shape: Shape) -> list[str]:
    """Everything that may be removed from a U-Net of this shape, by name, finest stage first.

    ``pair.S.J``: layer J of down stage S together with the layer of the mirrored up stage that its skip connection
    feeds. ``transformers.S``: all transformers of a stage and its mirror. ``depth.S.D``: transformers of a stage, its
    mirror, and of the middle if it is the last, cut to their first D blocks (SDXL). ``mid``: the middle.
    ``innermost``: the last stage, its mirror and the middle, where the last stage has no transformers.
    """
    found = []
    for s in range(shape.stages):
        found += [f"pair.{s}.{j}" for j in range(1, shape.layers[s])]
        if shape.depths[s] and s < shape.stages - 1:  # the depth of the last stage's is the middle's too
            found.append(f"transformers.{s}")
        found += [f"depth.{s}.{d}" for d in range(1, shape.depths[s])]
    if shape.mid_depth >= 0:
        found.append("mid")
    if shape.stages > 2 and not shape.depths[-1]:
        found.append("innermost")
    return found


def named_list(name: str, shape: Shape) -> tuple[str, ...]:
    """The candidates of a list in :data:`LISTS`. Raises CompactError where the U-Net has not what it removes."""
    if name not in LISTS:
        raise CompactError(f"There is no list {name!r}; the lists are {', '.join(LISTS)}.")
    pairs = [f"pair.{s}.{j}" for s in range(shape.stages) for j in range(1, shape.layers[s])]
    if not pairs:
        raise CompactError("This U-Net has one layer in each stage already: it is a compact one. Give the original.")
    if name == "shallow":
        outer = min(2, shape.stages - 1)
        finest = tuple(f"pair.{s}.{shape.layers[s] - 1}" for s in range(outer) if shape.layers[s] > 1)
        if not finest:
            raise CompactError(
                f"This U-Net has one layer in each of its {outer} finest stages already: it is a compact one. Give the "
                "original."
            )
        return finest
    if name == "bk-base":
        return tuple(pairs)
    if shape.mid_depth < 0:
        raise CompactError(f"{name} removes the middle, which this U-Net has not. Give the original.")
    if name == "bk-small":
        return (*pairs, "mid")
    if "innermost" not in candidates(shape):
        raise CompactError(
            "bk-tiny removes the innermost stage, where this U-Net keeps most of its transformers (SDXL). Use bk-base, "
            "bk-small or a budget."
        )
    return (*(p for p in pairs if _parse(p)[1] != shape.stages - 1), "innermost")


def already_compact(shape: Shape) -> str:
    """A sentence about a U-Net that looks assembled already, else empty: originals have stages of one length and a
    middle."""
    if len(set(shape.layers)) > 1:
        return f"This U-Net has {', '.join(map(str, shape.layers))} layers in its stages: it is a compact one already."
    return "This U-Net has no middle: it is a compact one already." if shape.mid_depth < 0 else ""


def _parse(name: str) -> tuple[str, int, int]:
    match = _NAME.fullmatch(name)
    if match is None or (match[1] in ("pair", "depth")) != (match[3] is not None):
        raise CompactError(
            f"{_shown(name)} names nothing that can be removed: pair.0.1, transformers.2, depth.1.4, mid, ..."
        )
    return match[1] or name, int(match[2] or 0), int(match[3] or 0)


@dataclass(frozen=True)
class Kept:
    """What stays of a U-Net: for each kept stage the numbers of its layers down and up, and what else goes.

    depths: transformer blocks that stay (0: the transformers go). mid: blocks of the middle, -1: it goes.
    """

    shape: Shape
    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]
    mid: int

    @property
    def result(self) -> Shape:
        """The shape of what is left."""
        count = len(self.down)
        return replace(
            self.shape,
            widths=self.shape.widths[:count],
            layers=tuple(len(stage) for stage in self.down),
            depths=self.depths,
            mid_depth=self.mid,
        )


def kept(shape: Shape, remove: Iterable[str]) -> Kept:
    """What is left of ``shape`` without ``remove``. Raises CompactError for names it has not, twice or at odds."""
    names, known = list(remove), set(candidates(shape))
    if unknown := [name for name in names if name not in known]:
        _parse(unknown[0])
        raise CompactError(f"This U-Net has no {unknown[0]} to remove; it has {', '.join(sorted(known))}.")
    if len(set(names)) != len(names):
        raise CompactError("A plan names the same part twice.")
    parsed = [_parse(name) for name in names]
    gone = {(s, j) for kind, s, j in parsed if kind == "pair"}
    cut = [(s, d if kind == "depth" else 0) for kind, s, d in parsed if kind in ("depth", "transformers")]
    innermost = "innermost" in names
    last = shape.stages - 1
    if len({s for s, _ in cut}) != len(cut):
        raise CompactError("A plan shortens the transformers of a stage in two ways.")
    if innermost and ("mid" in names or any(s == last for s, _ in (*gone, *cut))):
        raise CompactError("Without the innermost stage nothing else of it, nor the middle, is there to remove.")
    stages = range(last if innermost else shape.stages)
    depths = dict(cut)
    mid = -1 if innermost or "mid" in names else depths.get(last, shape.mid_depth)
    return Kept(
        shape,
        down=tuple(tuple(j for j in range(shape.layers[s]) if (s, j) not in gone) for s in stages),
        up=tuple(tuple(u for u in range(shape.layers[s] + 1) if (s, shape.layers[s] - u) not in gone) for s in stages),
        depths=tuple(depths.get(s, shape.depths[s]) for s in stages),
        mid=mid,
    )


def new_config(config: Mapping[str, Any], stays: Kept) -> dict[str, Any]:
    """The diffusers configuration of what stays. Lists are used only where the stages differ."""
    count, shape = len(stays.down), stays.result
    depth = [d or 1 for d in shape.depths]
    if shape.mid_depth >= 0:
        depth[-1] = shape.mid_depth  # of the middle too; where its stage has no transformers, of the middle alone
    changed = {
        "block_out_channels": list(shape.widths),
        "layers_per_block": _one_or_list(shape.layers),
        "transformer_layers_per_block": _one_or_list(depth),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in shape.depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(shape.depths)],
        "mid_block_type": None if shape.mid_depth < 0 else "UNetMidBlock2DCrossAttn",
    }
    for name in ("attention_head_dim", "num_attention_heads", "only_cross_attention", "cross_attention_dim"):
        if isinstance(config.get(name), (list, tuple)):
            changed[name] = list(config[name])[:count]
    return {**config, **changed}


def _one_or_list(values: Sequence[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def old_name(name: str, stays: Kept) -> str:
    """Name in the original of a tensor of what stays, both by diffusers' names."""
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    stages, dropped = len(stays.down), stays.shape.stages - len(stays.down)
    if match is None:
        outer = re.fullmatch(r"up_blocks\.(\d+)\.(.+)", name)
        return f"up_blocks.{int(outer[1]) + dropped}.{outer[2]}" if outer else name
    way, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if way == "down":
        return f"down_blocks.{block}.{kind}.{stays.down[block][number]}.{rest}"
    return f"up_blocks.{block + dropped}.{kind}.{stays.up[stages - 1 - block][number]}.{rest}"


LAYER = re.compile(
    r"(?P<way>down|up)(?P<blocks>[_.]blocks[._])(?P<block>\d+)(?P<dot>[._])"
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)(?P<dash>[._])(?P<number>\d+)(?=[._])"
)
"""Where a name says which layer of a stage it is of: diffusers' names, with any prefix, and kohya's."""


def new_name(name: str, stays: Kept) -> str | None:
    """Name in the compact U-Net of a tensor of the original, by diffusers' or kohya's names; None if it goes."""
    deep = re.search(r"transformer_blocks[._](\d+)", name)
    block_of_transformer = int(deep[1]) if deep else 0
    if "mid_block" in name:
        return None if stays.mid < 0 or (deep and block_of_transformer >= stays.mid) else name
    match = LAYER.search(name)
    if match is None:
        return name
    way, kind, block, number = match["way"], match["kind"], int(match["block"]), int(match["number"])
    stages, dropped = len(stays.down), stays.shape.stages - len(stays.down)
    stage = block if way == "down" else stays.shape.stages - 1 - block
    new = block if way == "down" else block - dropped
    if stage >= stages or (kind == "downsamplers" and stage == stages - 1):
        return None
    if kind == "attentions" and block_of_transformer >= stays.depths[stage]:
        return None
    numbers = (stays.down if way == "down" else stays.up)[stage] if kind in ("resnets", "attentions") else (number,)
    if number not in numbers:
        return None
    place = f"{way}{match['blocks']}{new}{match['dot']}{kind}{match['dash']}{numbers.index(number)}"
    return name[: match.start()] + place + name[match.end() :]


def slimmed_stages(stays: Kept) -> list[int]:
    """Stages of the original, finest first, that keep less than they had and still fit into it.

    These are what incubation trains one at a time. Without the innermost stage the one above has no way into it.
    """
    shape = stays.shape
    count = len(stays.down) - (len(stays.down) < shape.stages)
    return [s for s in range(count) if len(stays.down[s]) < shape.layers[s] or stays.depths[s] != shape.depths[s]]
