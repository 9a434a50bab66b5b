"""The application the commands register with: its global options and how it fails."""

from __future__ import annotations

import os
import warnings
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from .. import __version__
from ..common.errors import ConfigError, SunFileError
from ..common.reading import ReadError
from ..pictures.recipe import RecipeError
from ..user_pictures import PictureError
from .show import err, notes_shown, out

BAD_INPUT, INTERRUPTED = 2, 130
_ERRORS = (RecipeError, ConfigError, SunFileError, PictureError, ReadError, OSError)
# By name, because their module needs torch, which --help should not wait for.
_LAZY_ERRORS = (
    "DataError",
    "NonFiniteLoss",
    "NonFiniteError",
    "PredictionError",
    "LtcError",
    "InheritanceError",
    "CompactError",
    "SwitchingError",
)


class SunGroup(TyperGroup):
    """Turns exceptions of any command into one sentence and an exit code; ``--debug`` keeps the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with notes_shown():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("stopped", style="yellow")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            # Typer's own exceptions (wrong usage, exit codes) are shown by Typer.
            usage = isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message")
            if usage or ctx.params.get("debug"):
                raise
            kinds = {kind.__name__ for kind in type(error).__mro__}
            expected = isinstance(error, _ERRORS) or not kinds.isdisjoint(_LAZY_ERRORS)
            text = (
                _sentence(error) if expected else f"{type(error).__name__}: {error}. Unexpected; --debug shows where."
            )
            err.print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)
            raise typer.Exit(BAD_INPUT if expected else 1) from None


def _sentence(error: Exception) -> str:
    """What an expected error says; of the system's the file and the reason, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


app = typer.Typer(cls=SunGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
emoji_app = typer.Typer(no_args_is_help=True, help="Train Emoji Diffusion, the small model that is shipped.")
app.add_typer(emoji_app, name="train-emoji")


def _version(value: bool) -> None:
    if value:
        out.print(f"sun {__version__}")
        raise typer.Exit()


@app.callback(
    epilog="""Start with: [bold]sun generate "large polar bear, yellow background"[/bold]

Exit codes: 0 done, 1 unexpected error, 2 wrong input, 3 done but for some pictures of --prompts, 130 interrupted."""
)
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error and the libraries' messages.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """SUN (SpeedUpNet): Stable Diffusion 1.x pictures in 4 U-Net calls, negative prompts included.

    Without --model and --adapter every command uses the small model and the adapter that come with the package.
    """
    # The commands read local files only; a library must not wait for a network that nobody asked for.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.filterwarnings("ignore", category=FutureWarning)
