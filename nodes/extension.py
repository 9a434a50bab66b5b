"""The list of nodes ComfyUI asks for when it loads the pack."""

from comfy_api.latest import ComfyExtension, io

from . import folders
from .inheritance import ApplyFeatureInheritance
from .ltc import ApplyLtcAccel
from .nodes import ApplySun, LoadEmojiDiffusion, LoadSunAdapter, SunSampler


class SunExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadSunAdapter,
            ApplySun,
            SunSampler,
            LoadEmojiDiffusion,
            ApplyLtcAccel,
            ApplyFeatureInheritance,
        ]


async def comfy_entrypoint() -> SunExtension:
    folders.register()  # not in on_load: ComfyUI 0.3.75 does not call it
    return SunExtension()
