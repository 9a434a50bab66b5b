"""A1111's and Forge's door. The host runs this file at start and takes the Script classes it finds in it.

The code lives in `webui/` and `sun/`. Both names are too common for a process shared with other extensions (the host's
own start file is `webui.py`), so they are loaded as parts of one package with a name of its own.
"""

import importlib
import sys
import types
from pathlib import Path

PACKAGE = "sd_webui_sun"


def _load_extension():
    """Imports `webui.extension` afresh, so that the host's "Reload UI" takes changed files."""
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.webui.extension")


extension = _load_extension()
extension.register()
SunScript = extension.SunScript
