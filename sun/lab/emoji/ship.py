"""Turn finished training runs into what the package ships: fp16 safetensors and a model card with its figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ... import shipped
from ...adapter import SunAdapter
from ...common.atomic import write_text
from ...common.markdown import table
from ...common.settings import ConfigError
from ...evaluation.cells import file_name
from ...evaluation.tables import agreement_tables
from ...pictures.png import grid, save_png
from ...pipelines.loading import load_pipeline
from ...training.card import EMOJI_NAME, batch_in_words, card, losses_in_words, put_name, write_card
from ...training.config import RunConfig
from ...training.state import describe_machine
from .base import SAMPLE_PROMPTS, sample_images
from .cards import data_section
from .checks import colour_figures
from .colours import Colours, load_autoencoder, measure
from .colours import table as colour_table
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
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


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
    vae_runs: Sequence[str | Path] = (),
) -> Path:
    """Write the model of ``run_folder`` as fp16 into ``destination`` with its card and its grid of 24 prompts.

    vae_runs: those that made its autoencoder, in order. The last one's decoder ships, which may have been trained on
    while the model was. Raises ConfigError when its encoder is not the model's.
    """
    run, out = Path(run_folder), Path(destination)
    pipe = load_pipeline(run / "model", torch.float16)
    if vae_runs:
        pipe.vae = of_same_latents(load_autoencoder(Path(vae_runs[-1]) / "vae").half(), pipe.vae, vae_runs[-1])
    if out.exists():
        shutil.rmtree(out)
    pipe.save_pretrained(out, safe_serialization=True)
    put_name(out, EMOJI_NAME)
    make_portable(out)
    # What lands in the file is fp16: the grid is made from these very weights.
    pipe = load_pipeline(out)
    images = sample_images(pipe, guidance_scale)
    save_png(captioned_grid(images, list(SAMPLE_PROMPTS), 6), out / "samples.png")
    runs = {f"autoencoder: {Path(folder).name}": Path(folder) for folder in vae_runs}
    histories = {what: _history(folder) for what, folder in (runs | {"text encoder and U-Net": run}).items()}
    write_base_card(pipe, out, guidance_scale, histories, notes)
    return out


def of_same_latents(vae: Any, other: Any, where: str | Path) -> Any:
    """``vae``, if its encoder and the scale of its latents are ``other``'s. Raises ConfigError, naming ``where``, if not."""
    ours, theirs = vae.encoder.state_dict(), other.encoder.state_dict()
    if ours.keys() != theirs.keys() or any(not torch.equal(ours[key], theirs[key]) for key in ours):
        raise ConfigError(f"the autoencoder of {where} has another encoder than the one the model was trained on.")
    factors = vae.config.scaling_factor, other.config.scaling_factor
    if factors[0] != factors[1]:
        raise ConfigError(
            f"the autoencoder of {where} scales latents by {factors[0]:g}, the one the model was trained on by "
            f"{factors[1]:g}."
        )
    return vae


def write_base_card(
    pipe: Any, folder: Path, guidance_scale: float, histories: Mapping[str, dict[str, Any]], notes: str
) -> None:
    """What the parts in ``folder`` are, their data, their runs by ``histories`` (last line of each log)."""
    style = STYLES["twemoji"]
    colours = f"""\
## Colours

Guidance extrapolates latents: a flat colour whose latents are scaled may saturate or fade, and should keep its hue.

{colour_table(_colours(folder))}"""
    data = f"""\
## Data and licences

- Pictures: `{style.package}` (npm). {style.attribution}. {style.licence}.
- Names and categories: `{METADATA_PACKAGE}` (npm), MIT.
- Captions are written by `sun/lab/emoji/scenes.py`: the emoji's names and a random part of size, place, background colour,
  mirroring and category; one scene in five shows two emoji. The emoji are the about 120
  `everyday` ones of `sun/lab/emoji/vocabulary.json`.

The weights are derived from the pictures and carry their licence, CC-BY 4.0."""
    write_card(
        folder,
        EMOJI_NAME,
        [
            _about_base(pipe, guidance_scale),
            _parts_of_base(pipe, folder),
            colours,
            data,
            _runs_of_base(histories),
            notes,
        ],
        license="cc-by-4.0",
        library_name="diffusers",
        pipeline_tag="text-to-image",
    )


def _about_base(pipe: Any, guidance_scale: float) -> str:
    pixels = pipe.unet.config.sample_size * 8
    return f"""\
A small Stable Diffusion 1.x: the same parts, topology and noise schedule (4 stages, 2 layers each, 16 cross-attention
layers, epsilon prediction), narrow enough to be trained on two CPU cores. {pixels} x {pixels} pixels.
It exists so that this project can train, test and show SUN on a real diffusion model that fits in a repository.

![24 prompts, 25 steps of DPM-Solver++ with CFG {guidance_scale:g}](samples.png)"""


def _parts_of_base(pipe: Any, folder: Path) -> str:
    unet, encoder, factor = pipe.unet.config, pipe.text_encoder.config, pipe.vae.config.scaling_factor
    clip = (
        f"CLIP text encoder, width {encoder.hidden_size}, {encoder.num_hidden_layers} layers, own BPE vocabulary of "
        f"{len(pipe.tokenizer)}"
    )
    parts = {
        f"U-Net, widths {tuple(unet.block_out_channels)}, {unet.attention_head_dim} heads": pipe.unet,
        clip: pipe.text_encoder,
        f"AutoencoderTiny (TAESD layout), scaling factor {factor:g}": pipe.vae,
    }
    counts = [(what, f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M") for what, part in parts.items()]
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6
    return table(["part", "parameters"], [*counts, ("all weights, fp16", f"{size:.1f} MB")])


def _runs_of_base(histories: Mapping[str, dict[str, Any]]) -> str:
    rows = [
        (what, log["step"], f"{log['seconds'] / 60:.0f}", losses_in_words(log["losses"]))
        for what, log in histories.items()
    ]
    precision = histories["text encoder and U-Net"].get("precision", "bf16")
    return f"""\
## Training

    sun train-emoji vae --config configs/emoji-vae.toml
    sun train-emoji recode --config configs/emoji-recode.toml
    sun train-emoji vae --config configs/emoji-decoder.toml
    sun train-emoji base --config configs/emoji-base.toml

{table(["", "steps", "minutes", "loss at the end"], rows)}

Seed {RunConfig().seed}, {precision}, EMA, on: {describe_machine()}."""


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
    settings["lr"] = f"{training['run']['lr']} ({training['run']['lr_schedule']})"
    about = (
        f"{target.stat().st_size / 1e6:.2f} MB, fp16, branches: {info.branches}, "
        f"guidance scale {adapter.guidance_in_words()}."
    )
    done = "".join(map(_run_lines, runs)) + f"Losses at the end: {losses_in_words(training['losses'])}."
    parts = [about, data_section(styles), f"## Training\n\n{done}"]
    parts += [table(["setting of the last run", "value"], settings.items()), notes]
    write_text(target.with_suffix(".md"), card(f"SUN adapter for {info.base_model}", parts))
    return target


def _run_lines(training: Mapping[str, Any]) -> str:
    """Markdown: the command of one run of ``sun train`` and what became of it."""
    run, processes = training["run"], training.get("processes", 1)
    launcher = f"torchrun --nproc_per_node {processes} -m " if processes > 1 else ""
    kind = "-several" if training.get("fine_tunes") else "-guided" if any(training.get("guidance_range", ())) else ""
    machine = f", on {training['machine']}" if "machine" in training else ""
    calls = run.get("unet_calls")
    budget = f"--set run.unet_calls={calls}" if calls else f"--minutes {run['minutes']:g}"
    return (
        f"    {launcher}sun train --config configs/emoji-sun{kind}.toml "
        f"{budget} --batch-size {run['batch_size']}\n\n"
        f"{training['step']} steps of {batch_in_words(run, processes)}, {training['seconds'] / 60:.0f} minutes, "
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
        text = (source / "README.md").read_text(encoding="utf-8")
        write_text(out / "README.md", f"{text}\n{notes}\n")
    return out


def ship_lora(source: str | Path, destination: str | Path, notes: str = "") -> Path:
    """:func:`ship_folder`, with the weights under a name that says what they are: that of the file ``destination``."""
    file = Path(destination)
    out = ship_folder(source, file.parent, notes)
    (weights,) = out.glob("*.safetensors")
    weights.rename(file)
    card = out / "README.md"
    write_text(card, card.read_text(encoding="utf-8").replace(weights.name, file.name))
    return file


def ship_runs(
    runs: Mapping[str, Path], guidance: float, notes: str = "", vae: Sequence[Path] = ()
) -> Iterator[tuple[str, Path]]:
    """Write finished runs to where the package keeps its models; yields what each is and where it went.

    runs: folders of runs by "model", "adapter", "image-text model", "LoRA", "ControlNet" and "inpainting model".
    guidance: scale of the card's pictures. vae: the autoencoder's runs, in order.
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
        elif name == "LoRA":
            yield name, ship_lora(run / "lora", shipped.EMOJI_LORA, notes)
        else:
            product, home = folders[name]
            yield name, Path(ship_folder(run / product, home, notes))


AGREEMENT = "## Does it draw what is asked for?"


def add_agreement(model: str | Path, report: str | Path) -> Path:
    """Put the agreement that ``sun evaluate`` measured of one model into its card, table and plot; returns the card.

    ``report`` is the folder of the evaluation. A section that is there already is replaced. Raises FileNotFoundError
    for a folder without figures.
    """
    file, source = Path(model) / "README.md", Path(report)
    figures = json.loads((source / "figures.json").read_text(encoding="utf-8"))
    name, measured = next(iter(figures["models"].items()))
    text = "\n\n".join(agreement_tables(measured, methods=False))
    plot = source / file_name(name) / "agreement-vs-guidance.png"
    if plot.is_file():
        shutil.copyfile(plot, file.with_name(plot.name))
        text += f"\n\n![Share of right pictures against the guidance scale]({plot.name})"
    section = (
        f'{AGREEMENT}\n\nJudged by `sun evaluate` (`measure = ["agreement"]`): the background by the frame of the '
        "picture, the object's colours by those of its artwork.\n\n" + text + "\n"
    )
    before = file.read_text(encoding="utf-8")
    start = before.find(AGREEMENT)
    if start >= 0:
        end = before.find("\n## ", start + 1)
        before = before[:start].rstrip() + (before[end:] if end >= 0 else "\n")
    write_text(file, f"{before.rstrip()}\n\n{section}")
    return file
