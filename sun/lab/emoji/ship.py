"""Turn finished training runs into what the package ships: fp16 safetensors and a model card with its figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ... import shipped
from ...adapter import SunAdapter
from ...common.settings import ConfigError
from ...evaluation.cells import file_name
from ...evaluation.tables import agreement_tables
from ...pictures.png import grid, save_png
from ...pipelines.loading import load_pipeline
from ...training.config import RunConfig
from ...training.state import describe_machine
from .base import SAMPLE_PROMPTS, sample_images
from .cards import data_section
from .checks import colour_figures
from .colours import Colours, load_autoencoder, measure, table
from .sources import METADATA_PACKAGE, STYLES


def captioned_grid(images: list[Image.Image], captions: list[str], columns: int) -> Image.Image:
    """Pictures with their prompts above, in rows of ``columns``."""
    rows = [
        grid(images[i : i + columns], columns, column_labels=captions[i : i + columns])
        for i in range(0, len(images), columns)
    ]
    page = Image.new("RGB", (rows[0].width, sum(r.height for r in rows)), "white")
    y = 0
    for row in rows:
        page.paste(row, (0, y))
        y += row.height
    return page


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    edit(settings)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_portable(model: Path) -> None:
    """Rid the configurations of a saved diffusers folder of what only holds on this machine, or warns elsewhere."""
    # AutoencoderTiny writes a setting into its own configuration that it warns about when reading it back.
    if json.loads((model / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderTiny":
        _edit_json(model / "vae" / "config.json", lambda settings: settings.pop("block_out_channels", None))
    for config in model.rglob("*.json"):  # where the run was on this machine is nobody's business
        if config.parent.name != "tokenizer":
            _edit_json(config, lambda settings: settings.pop("_name_or_path", None))
    # transformers loads in the dtype named here and diffusers in fp32: name the same one.
    _edit_json(model / "text_encoder" / "config.json", lambda settings: settings.update(dtype="float32"))
    # A tokenizer that was used remembers how its last texts were padded and cut.
    _edit_json(model / "tokenizer" / "tokenizer.json", lambda settings: settings.update(truncation=None, padding=None))


def _history(run: Path) -> dict[str, Any]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def _colours(model: Path) -> Colours:
    """Those of a model; of the backgrounds alone where the emoji's pictures cannot be had."""
    try:
        return colour_figures(model)
    except ConfigError as error:
        tqdm.write(f"The card has the backgrounds' colours alone: {error}")
        return measure(load_autoencoder(model))


def ship_base(
    run_folder: str | Path,
    destination: str | Path,
    guidance_scale: float,
    notes: str = "",
    vae_run: str | Path | None = None,
) -> Path:
    """Write the model of ``run_folder`` as fp16 into ``destination`` with its card and its grid of 24 prompts."""
    run, out = Path(run_folder), Path(destination)
    pipe = load_pipeline(run / "model", torch.float16)
    if out.exists():
        shutil.rmtree(out)
    pipe.save_pretrained(out, safe_serialization=True)
    make_portable(out)
    # What lands in the file is fp16: the grid is made from these very weights.
    pipe = load_pipeline(out)
    images = sample_images(pipe, guidance_scale)
    save_png(captioned_grid(images, list(SAMPLE_PROMPTS), 6), out / "samples.png")
    runs = {"autoencoder": vae_run, "text encoder and U-Net": run}
    histories = {what: _history(Path(folder)) for what, folder in runs.items() if folder}
    (out / "README.md").write_text(base_card(pipe, out, guidance_scale, histories, notes))
    return out


def base_card(
    pipe: Any, folder: Path, guidance_scale: float, histories: Mapping[str, dict[str, Any]], notes: str
) -> str:
    """The model card, Markdown: what the parts are, their data, their runs by ``histories`` (last line of each log)."""
    unet, encoder = pipe.unet.config, pipe.text_encoder.config
    counts = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6 for name in ("unet", "text_encoder", "vae")
    }
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6
    pixels, style = unet.sample_size * 8, STYLES["twemoji"]
    done = histories["text encoder and U-Net"]
    colours = table(_colours(folder))
    return f"""---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Emoji Diffusion

A small Stable Diffusion 1.x: the same parts, topology and noise schedule (4 stages, 2 layers each, 16 cross-attention
layers, epsilon prediction), narrow enough to be trained on two CPU cores. {pixels} x {pixels} pixels.
It exists so that this project can train, test and show SUN on a real diffusion model that fits in a repository.

![24 prompts, 25 steps of DPM-Solver++ with CFG {guidance_scale:g}](samples.png)

| part | parameters |
|---|---|
| U-Net, widths {tuple(unet.block_out_channels)}, {unet.attention_head_dim} heads | {counts["unet"]:.2f} M |
| CLIP text encoder, width {encoder.hidden_size}, {encoder.num_hidden_layers} layers, own BPE vocabulary of {len(pipe.tokenizer)} | {counts["text_encoder"]:.2f} M |
| AutoencoderTiny (TAESD layout), scaling factor {pipe.vae.config.scaling_factor:g} | {counts["vae"]:.2f} M |
| all weights, fp16 | {size:.1f} MB |

## Colours

Guidance extrapolates latents: a flat colour whose latents are scaled may saturate or fade, and should keep its hue.

{colours}
## Data and licences

- Pictures: `{style.package}` (npm). {style.attribution}. {style.licence}.
- Names and categories: `{METADATA_PACKAGE}` (npm), MIT.
- Captions are written by `sun/lab/emoji/scenes.py`: the emoji's names and a random part of size, place, background colour,
  mirroring and category; one scene in five shows two emoji. The emoji are the about 120
  `everyday` ones of `sun/lab/emoji/vocabulary.json`.

The weights are derived from the pictures and carry their licence, CC-BY 4.0.

## Training

    sun train-emoji vae --config configs/emoji-vae.toml
    sun train-emoji base --config configs/emoji-base.toml

| | steps | minutes | loss at the end |
|---|---|---|---|
{"".join(_trained(what, log) for what, log in histories.items())}
Seed {RunConfig().seed}, {done.get("precision", "bf16")}, EMA, on: {describe_machine()}.

{notes}
"""


def _trained(what: str, log: Mapping[str, Any]) -> str:
    losses = ", ".join(f"{name} {value:.4f}" for name, value in log["losses"].items())
    return f"| {what} | {log['step']} | {log['seconds'] / 60:.0f} | {losses} |\n"


def ship_adapter(run_folder: str | Path, destination: str | Path, notes: str = "") -> Path:
    """Copy the adapter of a SUN run into the package and write its card from the header's figures."""
    source, target = Path(run_folder) / "adapter.safetensors", Path(destination)
    shutil.copyfile(source, target)
    adapter = SunAdapter.load(target)
    info, training = adapter.info, adapter.info.training
    runs = [training]
    while earlier := runs[0].get("from"):
        runs.insert(0, earlier)
    tuned = {name.removeprefix("emoji-") for run in runs for name in run.get("fine_tunes", ())}
    styles = ("twemoji", *(style for style in STYLES if style in tuned))
    told = ("run", "losses", "step", "seconds", "processes", "machine", "from")
    settings = {name: value for name, value in training.items() if name not in told}
    target.with_suffix(".md").write_text(
        f"""# SUN adapter for {info.base_model}

{target.stat().st_size / 1e6:.2f} MB, fp16, branches: {info.branches}, guidance scale {adapter.guidance_in_words()}.

{data_section(styles)}
## Training

{"".join(map(_run_lines, runs))}Losses at the end: {", ".join(f"{k} {v:.4f}" for k, v in training["losses"].items())}.

| setting of the last run | value |
|---|---|
"""
        + "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        + f"| lr | {training['run']['lr']} ({training['run']['lr_schedule']}) |\n\n{notes}\n"
    )
    return target


def _run_lines(training: Mapping[str, Any]) -> str:
    """Markdown: the command of one run of ``sun train`` and what became of it."""
    run, processes = training["run"], training.get("processes", 1)
    launcher = f"torchrun --nproc_per_node {processes} -m " if processes > 1 else ""
    kind = "-several" if training.get("fine_tunes") else "-guided" if any(training.get("guidance_range", ())) else ""
    machine = f", on {training['machine']}" if "machine" in training else ""
    return (
        f"    {launcher}sun train --config configs/emoji-sun{kind}.toml --minutes {run['minutes']:g} "
        f"--batch-size {run['batch_size']}\n\n"
        f"{training['step']} steps of batch {processes} x {run['batch_size']}, {training['seconds'] / 60:.0f} minutes, "
        f"seed {run['seed']}{machine}.\n\n"
    )


def ship_folder(source: str | Path, destination: str | Path, notes: str = "") -> Path:
    """Copy a folder that a run wrote ready to be shipped (weights and card) and add ``notes`` to its card.

    Raises FileNotFoundError when there is no card: the run is not finished.
    """
    source, out = Path(source), Path(destination)
    if not (source / "README.md").exists():
        raise FileNotFoundError(f"{source} has no README.md: give the folder of a run that has ended.")
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(source, out)
    if notes:
        (out / "README.md").write_text(f"{(source / 'README.md').read_text()}\n{notes}\n")
    return out


def ship_runs(
    runs: Mapping[str, Path], guidance: float, notes: str = "", vae: Path | None = None
) -> Iterator[tuple[str, Path]]:
    """Write finished runs to where the package keeps its models; yields what each is and where it went.

    runs: folders of runs by "model", "adapter", "image-text model", "LoRA", "ControlNet" and "inpainting model".
    guidance: scale of the card's pictures. vae: the autoencoder's run, for the model's card.
    """
    folders = {
        "image-text model": ("contrast", shipped.EMOJI_CONTRAST),
        "ControlNet": ("controlnet", shipped.EMOJI_CONTROLNET.parent),
        "inpainting model": ("inpainting", shipped.EMOJI_INPAINTING.parent),
    }
    for name, run in runs.items():
        if name == "model":
            yield name, Path(ship_base(run, shipped.EMOJI_DIFFUSION, guidance, notes, vae))
        elif name == "adapter":
            yield name, Path(ship_adapter(run, shipped.EMOJI_SUN, notes))
        else:
            product, home = folders.get(name, ("lora", shipped.MODELS_DIR / run.name))
            yield name, Path(ship_folder(run / product, home, notes))


AGREEMENT = "## Does it draw what is asked for?"


def add_agreement(model: str | Path, report: str | Path) -> Path:
    """Put the agreement that ``sun evaluate`` measured of one model into its card, table and plot; returns the card.

    ``report`` is the folder of the evaluation. A section that is there already is replaced. Raises FileNotFoundError
    for a folder without figures.
    """
    card, source = Path(model) / "README.md", Path(report)
    figures = json.loads((source / "figures.json").read_text(encoding="utf-8"))
    name, measured = next(iter(figures["models"].items()))
    text = "\n\n".join(agreement_tables(measured))
    plot = source / file_name(name) / "agreement-vs-guidance.png"
    if plot.is_file():
        shutil.copyfile(plot, card.with_name(plot.name))
        text += f"\n\n![Share of right pictures against the guidance scale]({plot.name})"
    section = (
        f'{AGREEMENT}\n\nJudged by `sun evaluate` (`measure = ["agreement"]`): the background by the frame of the '
        "picture, the object's colours by those of its artwork.\n\n" + text + "\n"
    )
    before = card.read_text(encoding="utf-8")
    start = before.find(AGREEMENT)
    if start >= 0:
        end = before.find("\n## ", start + 1)
        before = before[:start].rstrip() + (before[end:] if end >= 0 else "\n")
    card.write_text(f"{before.rstrip()}\n\n{section}", encoding="utf-8")
    return card
