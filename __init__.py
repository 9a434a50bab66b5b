"""ComfyUI's door: the node list and the web folder. Safe to import anywhere; outside ComfyUI it defines nothing."""

import importlib.util
import logging


def _host_has(module: str) -> bool:
    """Whether the running program can import `module` (False too when a parent package is missing)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


if __package__ and _host_has("comfy_api.latest"):
    from .nodes.extension import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
elif _host_has("comfy.model_patcher") and _host_has("comfy_execution"):
    logging.error("SUN: this ComfyUI is too old, its nodes are not loaded. Update ComfyUI to 0.3.75 or newer.")
