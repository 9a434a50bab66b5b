"""``sun reproduce``."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from ..common.settings import configured
from .app import app
from .options import ConfigFile, Settings
from .show import out


@app.command(
    epilog="""Examples:

sun reproduce --config configs/reproduce.toml

sun reproduce --config configs/reproduce.toml --minutes 10 --ship

sun reproduce --quick --output /tmp/quick

accelerate launch -m sun reproduce --config configs/reproduce.toml"""
)
def reproduce(
    config: ConfigFile = None,
    output: Annotated[str | None, typer.Option(help="Folder for every run and result.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Of training together, shared as the configuration shares it.", min=0.0)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The whole chain with tiny numbers: shows that it runs, in minutes.")
    ] = False,
    ship: Annotated[
        bool, typer.Option("--ship", help="Write the results into this package; without, into OUTPUT/release.")
    ] = False,
    settings: Settings = None,
) -> None:
    """Make everything that ships anew: models, adapters, peers, reports. Goes on where it stopped."""
    lab, stages = (import_module(f"..lab.{name}", __package__) for name in ("reproduce", "stages"))
    given = {"output": output, "minutes": minutes}
    wanted = configured(stages.ReproduceConfig(), config, given, {}, settings)
    folder = lab.reproduce(wanted, tiny=quick, ship=ship, say=lambda text: out.print(text, soft_wrap=True))
    out.print(f"all of it: {folder}", soft_wrap=True)
