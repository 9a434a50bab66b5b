"""Which rows are drawn together, and drawing them: texts encoded once, what fails set apart.

A picture's last bits can depend on what it is drawn beside of. So who is beside whom follows from the rows alone: a
block's rows that agree in all but texts, seed and pictures, in their order, so many at a time. Who draws the block,
and what of it is there already, changes nothing. Texts are encoded one by one, as their length and number would show.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...common.finite import NonFiniteError
from ...common.notes import note
from ...common.reading import ReadError, printable
from ...pipelines.text import encode_prompts, token_blocks
from ...user_pictures import PictureError
from .. import draw
from ..recipe import MAX_PIXELS, Recipe, RecipeError, fingerprints, png_text
from .rows import Failure, Row

CACHE_BYTES = 256 * 2**20
"""Text states that are kept: 1,100 texts of Stable Diffusion 1.x in float32."""


@dataclass(frozen=True)
class Picture:
    """What is kept of a row: the picture and the text chunks of its PNG."""

    row: Row
    image: Image.Image
    text: dict[str, str]


class TextCache:
    """Text states of the texts used last, by text."""

    def __init__(self, pipe: Any, most: int = CACHE_BYTES, encode: Any = encode_prompts):
        self.pipe, self.most, self.encode, self.encoded, self._bytes = pipe, most, encode, 0, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def states(self, text: str) -> Tensor:
        """[L, D] of one text, as `encode` makes them of it alone. Raises ValueError."""
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        with torch.no_grad():
            (states,) = self.encode(self.pipe.tokenizer, self.pipe.text_encoder, [text])
        self.encoded += 1
        self._kept[text] = kept = states[0]
        self._bytes += kept.nbytes
        while self._bytes > self.most and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return kept

    def pair(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """States [L, D] of both, of one length: the shorter repeated. Raises ValueError."""
        found = [self.states(prompt), self.states(negative)]
        length = math.lcm(*(len(states) for states in found))
        first, second = (states.repeat(length // len(states), 1) for states in found)
        return first, second


class Drawing:
    """A loaded model that draws rows; ``together`` at most at a time.

    Raises RecipeError where not even the command's own negative prompt can be encoded: that is no fault of the rows.
    """

    def __init__(self, loaded: draw.Loaded, base: Recipe, together: int):
        self.loaded, self.together, self.texts = loaded, together, TextCache(loaded.pipe, encode=draw.encoder_of(base))
        try:
            self.texts.states(base.negative)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        own = {"init": "", "mask": "", "control": ""}
        self._prints = draw.prints_of(replace(base, **own))  # type: ignore[arg-type]
        self._made_with = draw.environment(base.device)
        self._too_many: set[tuple[Any, ...]] = set()

    def complete(self, rows: Iterable[Row]) -> tuple[list[Row], list[Failure]]:
        """The rows with every default filled in, and those that cannot be drawn."""
        good: list[Row] = []
        failed: list[Failure] = []
        for row in rows:
            try:
                recipe = draw.complete(row.recipe, self.loaded)
                self._length(recipe)
                good.append(replace(row, recipe=recipe))
            except ValueError as error:  # RecipeError, and of texts that are too long
                failed.append(failure(row, error))
        return good, failed

    def batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The complete rows of a block as they are drawn: the same whoever asks."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault((*draw.batch_key(row.recipe), self._length(row.recipe)), []).append(row)
        found = []
        for group in groups.values():
            pixels = group[0].recipe.width * group[0].recipe.height
            most = max(1, min(self.together, MAX_PIXELS // max(pixels, 1)))
            found += [group[i : i + most] for i in range(0, len(group), most)]
        return found

    def draw(self, batch: Sequence[Row]) -> tuple[list[Picture], list[Failure]]:
        """Draw a batch; what is none is drawn one by one, so that one row costs the others nothing."""
        if len(batch) > 1 and draw.batch_key(batch[0].recipe) not in self._too_many:
            try:
                return self._draw(batch)
            except (RecipeError, PictureError, ReadError):
                pass
            except RuntimeError as error:
                _unless_memory(error)
                self._too_many.add(draw.batch_key(batch[0].recipe))
                size = f"{batch[0].recipe.width}x{batch[0].recipe.height}"
                note(f"{len(batch)} pictures of {size} together do not fit into the memory: they are drawn one by one.")
            _free_memory()
        pictures: list[Picture] = []
        failed: list[Failure] = []
        for row in batch:
            try:
                made, lost = self._draw([row])
                pictures += made
                failed += lost
            except (RecipeError, PictureError, ReadError) as error:
                failed.append(failure(row, error))
            except (RuntimeError, MemoryError) as error:
                _unless_memory(error)
                failed.append(Failure(row.index, row.line, "memory", "the memory is not enough", row.recipe.prompt))
                _free_memory()
        return pictures, failed

    def _draw(self, batch: Sequence[Row]) -> tuple[list[Picture], list[Failure]]:
        recipes = [row.recipe for row in batch]
        pairs = [self.texts.pair(recipe.prompt, recipe.negative) for recipe in recipes]
        positive, negative = (torch.stack(states) for states in zip(*pairs, strict=True))
        drawn = draw.draw_rows(self.loaded, recipes, (positive, negative))
        pictures: list[Picture] = []
        failed: list[Failure] = []
        for row, image, whole in zip(batch, drawn.images, drawn.whole, strict=True):
            if whole:
                pictures.append(Picture(row, image, self._png_text(row.recipe, len(batch))))
            else:
                reason = f"the picture holds NaN or infinity. {draw.why_not_whole(self.loaded)}"
                failed.append(failure(row, NonFiniteError(reason), "numbers"))
        return pictures, failed

    def _length(self, recipe: Recipe) -> int:
        """Blocks of tokens that the texts of a row are made as long as. Raises ValueError for one that is too long."""
        tokenizer = self.loaded.pipe.tokenizer
        if recipe.prompt_weights != "none":  # how long they become shows once they are encoded
            return len(self.texts.pair(recipe.prompt, recipe.negative)[0]) // tokenizer.model_max_length
        return math.lcm(*(len(token_blocks(tokenizer, text)) for text in (recipe.prompt, recipe.negative)))

    def _png_text(self, recipe: Recipe, together: int) -> dict[str, str]:
        named = draw.named_files(recipe)
        made_with = {**self._made_with, **({draw.TOGETHER: str(together)} if together > 1 else {})}
        own = fingerprints({field: path for field, path in named.items() if field not in self._prints})
        prints = {**self._prints, **own}
        return png_text(recipe, 0, made_with, {field: prints[field] for field in named})


def failure(row: Row, error: Exception, kind: str = "") -> Failure:
    """Why there is no picture of a row. A picture it starts from may be there another time; the row stays as it is."""
    named = isinstance(error, PictureError) or isinstance(error.__cause__, PictureError)
    kind = kind or ("picture" if named else "row")
    return Failure(row.index, row.line, kind, printable(str(error)), row.recipe.prompt)


def _unless_memory(error: BaseException) -> None:
    """Raise an error again unless it says that there is no memory left."""
    lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not lacking and "allocate memory" not in str(error) and "out of memory" not in str(error).lower():
        raise error


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
