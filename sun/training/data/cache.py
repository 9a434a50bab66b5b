"""A folder's pictures encoded once: latents, and the captions' text states if asked for, on disk.

``$SUN_CACHE/training/KEY/000000.safetensors`` holds 256 pictures: ``latents`` [n, 4, h, w], ``text`` [n, L, D], both
fp16, and ``index`` [n], their numbers in the folder's list. The key is made of everything they depend on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ...common.cache import cache_dir
from ...common.reading import check_regular
from ...user_pictures import open_picture
from .samples import (
    UNREADABLE,
    DataError,
    Encode,
    Lanes,
    Order,
    Skipped,
    check_position,
    crop,
    encode_pixels,
    to_tensor,
)

CHUNK = 256
_BATCH = 8


class CachedFolder:
    """A :class:`~.sources.Source` over latents on disk; the autoencoder takes no part in training.

    The mean of the autoencoder's posterior is kept, where :class:`~.captioned.FolderSource` draws from it anew each
    time (its deviation is far below the noise that training adds).
    """

    def __init__(
        self,
        pairs: list[tuple[Path, str]],
        vae: Any,
        resolution: int,
        device: torch.device,
        seed: int,
        lanes: Lanes,
        skipped: Skipped,
        encode: Encode | None = None,
    ):
        self.pairs, self.device, self.lanes, self.skipped = pairs, device, lanes, skipped
        # The first process's key for all: two devices may round the text encoder's probe differently.
        key = broadcast_object_list([cache_key(pairs, vae, resolution, encode)])[0]
        self.folder = cache_dir() / "training" / key
        build_cache(self.folder, pairs, vae, resolution, device, encode)
        self.files = [_open_chunk(self.folder, i, pairs, encode is not None) for i in range(_chunks(pairs))]
        self.places = [
            (chunk, row, index)
            for chunk, file in enumerate(self.files)
            for row, index in enumerate(file.get_tensor("index").tolist())
        ]
        if not self.places:
            raise DataError(f"none of the {len(pairs)} pictures can be read; the first is {pairs[0][0]}.")
        if len(self.places) < len(pairs):
            readable = {index for *_, index in self.places}
            first = next(path for i, (path, _) in enumerate(pairs) if i not in readable)
            skipped.add("unreadable pictures", str(first), len(pairs) - len(self.places))
        self.text = {pairs[index][1]: (chunk, row) for chunk, row, index in self.places} if encode else {}
        self.order = Order(len(self.places), seed)
        self.calls = 0

    def __call__(self, count: int) -> tuple[Tensor, list[str]]:
        first = self.lanes.batch_number(self.calls) * count
        self.calls += 1
        picked = [self.places[self.order[first + i]] for i in range(count)]
        latents = torch.cat([self._row("latents", chunk, row) for chunk, row, _ in picked])
        return latents.to(self.device), [self.pairs[index][1] for *_, index in picked]

    def _row(self, name: str, chunk: int, row: int) -> Tensor:
        tensor: Tensor = self.files[chunk].get_slice(name)[row : row + 1]
        if not torch.isfinite(tensor).all():
            raise DataError(
                f"{self.folder / _name(chunk)} is damaged: it holds NaN or infinity. Remove it, then run again."
            )
        return tensor.float()  # the CPU's bf16 autocast cannot join fp16 tensors

    def encoder(self, encode: Encode) -> Encode:
        """Takes the states of the folder's captions from disk and encodes the other texts (the negatives)."""
        if not self.text:
            return encode

        def states(texts: list[str]) -> Tensor:
            others = [t for t in texts if t not in self.text]
            encoded = iter(encode(others).float().split(1)) if others else iter(())
            kept = {t: self._row("text", *self.text[t]).to(self.device) for t in texts if t in self.text}
            return torch.cat([kept[t] if t in kept else next(encoded) for t in texts])

        return states

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = check_position(state["calls"])


def cache_key(pairs: list[tuple[Path, str]], vae: Any, resolution: int, encode: Encode | None) -> str:
    """Name of the cache of these pictures (by name, size and time), this autoencoder and this text encoder."""
    made_from = hashlib.sha256(f"3 {resolution} {vae.config.scaling_factor}".encode())
    for path, caption in pairs:
        status = path.stat()
        made_from.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        if encode is not None:
            made_from.update(caption.encode())
    for part in (vae.encoder, getattr(vae, "quant_conv", None)):
        if part is not None:
            hash_weights(made_from, part)
    if encode is not None:  # a probe instead of its weights: the function hides them
        made_from.update(encode(["a photograph of a cat, blurry"]).detach().half().cpu().numpy().tobytes())
    return made_from.hexdigest()[:24]


def hash_weights(made_from: Any, module: Any) -> None:
    """Add the weights of ``module`` to a hash, in fp16: a model that ships in half precision is the same model."""
    for weight in module.state_dict().values():
        made_from.update(weight.detach().half().cpu().numpy().tobytes())


@torch.no_grad()
def build_cache(
    folder: Path, pairs: list[tuple[Path, str]], vae: Any, resolution: int, device: torch.device, encode: Encode | None
) -> None:
    """Write the chunks that are missing or damaged, divided among the processes. Goes on where an earlier call was
    stopped. Raises DataError when a chunk cannot be put in its place, OSError without room."""
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    mine = [i for i in range(_chunks(pairs)) if i % state.num_processes == state.process_index]
    todo = [i for i in mine if _must_encode(folder, i, pairs, encode is not None)]
    for chunk in tqdm(todo, desc=f"encode {len(pairs)} pictures", disable=not (todo and state.is_main_process)):
        tensors = _encode_chunk(
            chunk * CHUNK, pairs[chunk * CHUNK : (chunk + 1) * CHUNK], vae, resolution, device, encode
        )
        write_tensors(folder / _name(chunk), tensors)
    state.wait_for_everyone()


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of a cache: complete or not at all. Raises OSError."""
    unfinished = file.with_name(f"{file.name}.part{os.getpid()}")
    try:
        save_file(tensors, unfinished)
        unfinished.replace(file)
    except Exception as error:  # safetensors has its own class for a full disk
        raise OSError(f"the cache {file} could not be written: {error}. Make room, or set SUN_CACHE.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_tensors(file: Path, fits: Callable[[dict[str, Tensor]], bool]) -> dict[str, Tensor] | None:
    """What :func:`write_tensors` wrote, if it ``fits``; None where nothing is, or a damaged file, which is removed and
    told of."""
    if not file.exists() and not file.is_symlink():
        return None
    try:
        check_regular(file)
        with safe_open(str(file), "pt") as handle:
            found = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118 - no mapping
        if fits(found):
            return found
    except Exception:  # a damaged header makes safetensors raise anything
        if file.is_dir():
            raise
    tqdm.write(f"the cache {file} is damaged. It is made again.")
    file.unlink()
    return None


def _must_encode(folder: Path, chunk: int, pairs: list[tuple[Path, str]], text: bool) -> bool:
    """Whether a chunk is not there yet; one that is damaged is removed, and said so."""
    file = folder / _name(chunk)
    if not file.exists() and not file.is_symlink():
        return True
    try:
        _open_chunk(folder, chunk, pairs, text)
    except DataError as error:
        if file.is_dir():
            raise
        tqdm.write(f"{error} It is made again.")
        file.unlink()
        return True
    return False


def _open_chunk(folder: Path, chunk: int, pairs: list[tuple[Path, str]], text: bool) -> Any:
    """The chunk's file, after comparing what it says it holds with what belongs there. Raises DataError."""
    file = folder / _name(chunk)
    first, last = chunk * CHUNK, min(len(pairs), (chunk + 1) * CHUNK)
    try:
        check_regular(file)
        handle = safe_open(str(file), "pt")
        index = handle.get_tensor("index")
        numbers = index.tolist()
        right = (
            index.dtype == torch.int64 and numbers == sorted(set(numbers)) and set(numbers) <= set(range(first, last))
        )
        for name, sides in (("latents", 4), *((("text", 3),) if text else ())):
            shape = handle.get_slice(name).get_shape() if numbers else [0] * sides
            right = right and len(shape) == sides and shape[0] == len(numbers)
    except Exception as error:  # a damaged header makes safetensors raise anything
        raise DataError(f"the cache {file} is damaged ({type(error).__name__}).") from error
    if not right:
        raise DataError(f"the cache {file} is damaged: it does not hold what it was made for.")
    return handle


def _encode_chunk(
    start: int, pairs: list[tuple[Path, str]], vae: Any, resolution: int, device: torch.device, encode: Encode | None
) -> dict[str, Tensor]:
    latents, texts, index = [torch.empty(0)], [torch.empty(0)], []
    for begin in range(0, len(pairs), _BATCH):
        pictures, captions = [], []
        for number, (path, caption) in enumerate(pairs[begin : begin + _BATCH], start + begin):
            try:
                pictures.append(to_tensor(crop(open_picture(path), resolution)))
            except UNREADABLE:
                continue  # left out of `index`; the reader counts and names it
            captions.append(caption)
            index.append(number)
        if pictures:
            latents.append(encode_pixels(vae, torch.stack(pictures).to(device), sample=False).cpu())
            if encode is not None:
                texts.append(encode(captions).float().cpu())
    tensors = {"index": torch.tensor(index, dtype=torch.int64)}
    for name, parts in (("latents", latents), ("text", texts)):
        if len(parts) > 1:
            tensors[name] = torch.cat(parts[1:]).half().contiguous()
    return tensors


def _chunks(pairs: list[tuple[Path, str]]) -> int:
    return -(-len(pairs) // CHUNK)


def _name(chunk: int) -> str:
    return f"{chunk:06d}.safetensors"
