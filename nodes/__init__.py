"""ComfyUI: thin V3 nodes over `sun/`. Everything here is reached through `extension.comfy_entrypoint`."""
