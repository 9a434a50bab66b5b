"""The list of nodes ComfyUI asks for when it loads the pack."""

from comfy_api.latest import ComfyExtension, io

from . import facts_route, folders
from .nodes import (
    ApplyExperts,
    ApplyFeatureInheritance,
    ApplyLtcAccel,
    ApplySun,
    ControlNetReadsBoth,
    LoadEmojiControlNet,
    LoadEmojiDiffusion,
    LoadSunAdapter,
    SunAdapterInfo,
    SunGuider,
    SunSampler,
    SunScheduler,
    SwitchUNets,
)


class SunExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadSunAdapter,
            ApplySun,
            SunSampler,
            SunScheduler,
            SunGuider,
            ControlNetReadsBoth,
            SunAdapterInfo,
            LoadEmojiDiffusion,
            LoadEmojiControlNet,
            ApplyLtcAccel,
            ApplyFeatureInheritance,
            SwitchUNets,
            ApplyExperts,
        ]


async def comfy_entrypoint() -> SunExtension:
    folders.register()  # not in on_load: ComfyUI 0.3.75 does not call it
    facts_route.register()
    return SunExtension()
