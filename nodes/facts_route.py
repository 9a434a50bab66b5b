"""Facts of an adapter file for the page to show under Load SUN Adapter: one route, GET /sun/adapter?name=..."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

from ..sun.facts import adapter_facts
from ..sun.files import SunFileError
from . import folders

log = logging.getLogger(__name__)


def facts_of(name: str) -> dict[str, Any]:
    """What the file behind a name of the list is, or {"error": why it cannot be used}. Never raises for a file."""
    try:
        path = folders.find(name)
    except FileNotFoundError:  # its message lists folders, too much for a node; running the node shows it
        return {"error": f"{name!r} is not there. Put it into models/sun and press R, or choose another."}
    try:
        return _read(path)
    except SunFileError as error:
        return {"error": str(error).replace(str(path), name)}
    except OSError as error:
        return {"error": f"{name} cannot be read: {error.strerror or error}."}
    except Exception as error:  # a stranger's file; the page is to say something, and the server to stay
        log.exception("SUN: %s cannot be described", path)
        return {"error": f"{name} cannot be described ({type(error).__name__}); ComfyUI's log says more."}


def _read(path: Path) -> dict[str, Any]:
    found = adapter_facts(path)
    return {
        "base_model": found.base_model or "",
        "positive": found.positive,
        "layers": found.layers,
        "parameters": found.parameters,
        "guidance_scale": found.guidance_scale,
        "takes_guidance_scale": found.takes_guidance_scale,
        "guidance_range": found.guidance_range,
        "steps": found.steps,
    }


def register() -> None:
    """Adds the route to ComfyUI's server; does nothing where nodes run without one."""
    module = sys.modules.get("server")  # importing it would start a database and more
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    @server.routes.get("/sun/adapter")
    async def adapter(request: web.Request) -> web.Response:
        # A disk may be slow or asleep; the server has other pages to serve meanwhile.
        name = request.query.get("name", "")
        return web.json_response(await asyncio.get_running_loop().run_in_executor(None, facts_of, name))
