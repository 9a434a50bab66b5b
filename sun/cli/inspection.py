"""``sun inspect``, ``sun convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..shipped import adapter_file
from .app import app
from .options import Dtype, Json, Layout, check_target
from .show import out, write_json


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Adapter, or any model file; emoji for the shipped adapter.")],
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Show alpha and beta of each layer.")] = True,
    figures: Json = None,
) -> None:
    """Tell what a file is; of a SUN adapter its base, branches, guidance scale, size and learned scales."""
    from ..facts import describe

    report = describe(adapter_file(file))
    for key, value in report.items():
        if key != "layers" and value not in ("", None, {}):
            out.print(f"[bold]{key.replace('_', ' ')}[/bold]: {escape(_plain(value))}", soft_wrap=True)
    if layers and "layers" in report:
        table = Table("layer", "width", title="alpha and beta, mean and standard deviation")
        branches = [b for b in ("neg", "pos") if f"alpha_{b}" in report["layers"][0]]
        for branch in branches:
            table.add_column(f"alpha {branch}", justify="right")
            table.add_column(f"beta {branch}", justify="right")
        for row in report["layers"]:
            cells = [
                f"{row[f'{p}_{b}'][0]:+.4f} ± {row[f'{p}_{b}'][1]:.4f}" for b in branches for p in ("alpha", "beta")
            ]
            table.add_row(row["name"], str(row["width"]), *cells)
        out.print(table)
    write_json(figures, report)


@app.command(
    epilog="""Examples:

sun convert sun_adapter_sdv15_4step_addpos.safetensors adapter.safetensors

sun convert adapter.safetensors for-the-authors-code.safetensors --layout official --dtype float16

sun convert emoji fixed-at-2.safetensors --guidance 2

sun convert adapter.safetensors weaker.safetensors --strength 0.75"""
)
def convert(
    source: Annotated[Path, typer.Argument(help="Adapter file of either layout; emoji for the shipped one.")],
    target: Annotated[Path, typer.Argument(help="File to write.")],
    layout: Annotated[Layout, typer.Option(help="sun: readable names; official: the authors' names.")] = Layout.sun,
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto keeps the file's.")] = Dtype.auto,
    guidance: Annotated[
        float | None, typer.Option(help="Fix this guidance scale, of an adapter that takes any.", min=0.01)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Put this strength into the weights.", min=-10.0, max=10.0)
    ] = None,
) -> None:
    """Write an adapter in the other layout or another number format; nothing is lost between layouts."""
    import torch

    from ..adapter import SunAdapter
    from ..surgery import bake, strengthen

    kind = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    if target.suffix.lower() != ".safetensors":
        raise typer.BadParameter(f"{target} should end in .safetensors")
    check_target(target, "TARGET")
    adapter = SunAdapter.load(adapter_file(source))
    if guidance is not None:
        if not adapter.guided:
            raise typer.BadParameter(f"{source} has its guidance scale fixed already; leave out --guidance")
        adapter = bake(adapter, guidance)
    if strength is not None:
        adapter = strengthen(adapter, strength)
    adapter.save(target, layout=layout.value, dtype=kind)
    out.print(f"{target} ({layout.value} layout, {target.stat().st_size:,} bytes)", soft_wrap=True)


def _plain(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else str(value)
