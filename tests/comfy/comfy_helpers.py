"""What the ComfyUI tests share: adapters with random weights, counting calls, comparing."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


def make_adapter(model_folder: Path, path: Path, positive: bool = True, seed: int = 1, guided: bool = False) -> None:
    """An adapter for a diffusers model, at its start values with some noise on them."""
    from diffusers import UNet2DConditionModel

    from sun.surgery import from_unet

    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(model_folder / "unet")
    adapter = from_unet(unet, positive=positive, w=4.0, guided=guided)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if "alpha" in name else 0.02))
    adapter.save(path, dtype=torch.float16)


def shake(module: torch.nn.Module, std: float = 0.02, seed: int = 2) -> None:
    """Random values for what is trained of a module, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def make_controlnet(model_folder: Path, path: Path) -> Path:
    """A Control-LoRA with random weights for a diffusers model."""
    from sun.lab.emoji.controlnet import build_controlnet, save_controlnet

    unet = _unet(model_folder)
    controlnet = build_controlnet(unet, 4)
    shake(controlnet)
    with pytest.MonkeyPatch.context() as patch:  # what is shipped has Stable Diffusion's two
        patch.setattr("sun.shipped.control_lora._LAYERS_PER_STAGE", unet.config.layers_per_block)
        return save_controlnet(controlnet, path, "Emoji Diffusion")


def make_inpainting(model_folder: Path, path: Path) -> Path:
    """Random changes that make a 9-channel U-Net of a diffusers model's."""
    from sun.lab.emoji.inpainting import FIRST_LAYER, save_inpainting, widen
    from sun.shipped.lowrank import add_low_rank

    unet = widen(_unet(model_folder))
    add_low_rank(unet, 4, leave=FIRST_LAYER)
    shake(unet)
    return save_inpainting(unet, path, "Emoji Diffusion")


def make_lora(model_folder: Path, folder: Path) -> Path:
    """A LoRA with random weights for a diffusers model, as `sun train-emoji lora` writes it."""
    from peft import LoraConfig

    from sun.lab.emoji.style import LORA_TARGETS, save_lora

    unet = _unet(model_folder)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return save_lora(unet, folder)


def make_small(model, model_folder: Path, layers: tuple[int, ...] = (1, 1, 2, 1)):
    """(MODEL, diffusers' U-Net) with fewer layers than `model`, the one of the folder, has; weights are random."""
    import comfy.model_management
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher
    from diffusers import UNet2DConditionModel

    torch.manual_seed(5)
    config = UNet2DConditionModel.load_config(model_folder / "unet") | {"layers_per_block": list(layers)}
    unet = UNet2DConditionModel.from_config(config).eval()
    base = model.model.model_config
    own = {**base.unet_config, "num_res_blocks": list(layers)}
    crossed = [int("CrossAttn" in kind) for kind in config["down_block_types"]]
    own["transformer_depth"] = [depth for depth, n in zip(crossed, layers, strict=True) for _ in range(n)]
    own["transformer_depth_output"] = [depth for depth, n in zip(crossed, layers, strict=True) for _ in range(n + 1)]
    heads = own.pop("num_heads")
    small = comfy.supported_models.SD15(own)
    small.unet_config["num_heads"] = heads
    small.sampling_settings, small.latent_format = base.sampling_settings, base.latent_format
    small.set_inference_dtype(torch.float32, None)
    made = small.get_model({}, device="cpu")
    names = _ldm_names(unet.state_dict(), layers)
    made.diffusion_model.load_state_dict({names[name]: weight for name, weight in unet.state_dict().items()})
    device = comfy.model_management.get_torch_device()
    return ModelPatcher(made, load_device=device, offload_device=comfy.model_management.unet_offload_device()), unet


def _ldm_names(names, layers: tuple[int, ...]) -> dict[str, str]:
    """LDM's name of each of diffusers' names; ComfyUI's own table is right for stages of equally many layers alone."""
    import comfy.utils

    places = {f"mid_block.{kind}.{i}": f"middle_block.{2 * i + (kind == 'attentions')}"
              for kind, i in (("resnets", 0), ("resnets", 1), ("attentions", 0))}  # fmt: skip
    n = 1
    for i, count in enumerate(layers):
        for j in range(count):
            places |= {f"down_blocks.{i}.{kind}.{j}": f"input_blocks.{n + j}.{k}"
                       for k, kind in enumerate(("resnets", "attentions"))}  # fmt: skip
        n += count + 1
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n - 1}.0.op"
    n = 0
    for i, count in enumerate(reversed(layers)):
        for j in range(count + 1):
            places |= {f"up_blocks.{i}.{kind}.{j}": f"output_blocks.{n + j}.{k}"
                       for k, kind in enumerate(("resnets", "attentions"))}  # fmt: skip
        n += count + 1
        last = 2 if any(name.startswith(f"up_blocks.{i}.attentions") for name in names) else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{last}.conv"
    inner = {theirs: own for own, theirs in comfy.utils.UNET_MAP_RESNET.items()}
    found = {theirs: own for own, theirs in comfy.utils.UNET_MAP_BASIC}
    for name in names:
        place = next((place for place in places if name.startswith(place + ".")), None)
        if place is not None:
            rest = name.removeprefix(place + ".")
            found[name] = f"{places[place]}.{inner[rest] if '.resnets.' in place else rest}"
    return found


def make_short(model_folder: Path, folder: Path, layers: int = 1) -> Path:
    """`folder` with all of a diffusers model but the U-Net, which has two stages, few layers and random weights."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(model_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("unet"))
    config = UNet2DConditionModel.load_config(model_folder / "unet")
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_config(
        config | {
            "block_out_channels": (32, 64), "layers_per_block": layers,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    )  # fmt: skip
    with torch.no_grad():  # in a model that was trained, texts matter
        for name, parameter in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name or name == "conv_out.weight":
                parameter.mul_(4.0)
    unet.save_pretrained(folder / "unet")
    return folder


def short_models(host, folder: Path, layers: int = 1) -> SimpleNamespace:
    """`models_of` such a model in the empty `folder`, with an adapter of random weights."""
    make_short(host.part("sun.shipped").EMOJI_DIFFUSION, folder, layers)
    file = folder / "emoji-sun.safetensors"
    make_adapter(folder, file)
    adapter = host.part("nodes.loading").load_adapter(file)
    return models_of(host, folder, file, adapter, host.part("nodes.emoji_model").load(folder))


def models_of(host, folder: Path, adapter_file: Path, adapter, loaded) -> SimpleNamespace:
    """.folder and .adapter_file; .emoji with .model, .clip and .vae; .adapter; .run (see `runs`)."""
    emoji = SimpleNamespace(**dict(zip(("model", "clip", "vae"), loaded, strict=True)))
    return SimpleNamespace(
        folder=folder, adapter_file=adapter_file, emoji=emoji, adapter=adapter, run=runs(host, emoji, adapter)
    )


def runs(host, emoji: SimpleNamespace, adapter) -> SimpleNamespace:
    """Short names for what the tests do with nodes, and .layers: how many SUN acts on."""

    def apply(model=None, strength: float = 1.0, negative=None, adapter=adapter, **effect):
        return host.nodes["SUN_Apply"].execute(model or emoji.model, adapter, strength, negative, **effect).result[0]

    def encode(text: str):
        return host.nodes["CLIPTextEncode"]().encode(emoji.clip, text)[0]

    def latent(width: int = 128, height: int = 128, batch: int = 1):
        return {"samples": torch.zeros(batch, 4, height // 8, width // 8)}

    default_positive, default_negative = encode("large polar bear, yellow background"), encode("blurry, red, a car")

    def output(
        model, positive=default_positive, negative=default_negative, start=None, seed=7, steps=4, denoise=1.0, **options
    ):
        sampler = host.nodes["SUN_Sampler"]
        start = latent() if start is None else start
        return sampler.execute(model, positive, negative, start, seed, steps, denoise, **options)

    def sun(model, *args, **kwargs):
        return output(model, *args, **kwargs).result[0]["samples"]

    def ksampler(
        model, positive=default_positive, negative=default_negative, start=None, seed=7, steps=4, cfg=1.0, name="euler",
        scheduler="simple", denoise=1.0,
    ):  # fmt: skip
        start = latent() if start is None else start
        node = host.nodes["KSampler"]()
        return node.sample(model, seed, steps, cfg, name, scheduler, positive, negative, start, denoise)[0]["samples"]

    return SimpleNamespace(
        apply=apply, encode=encode, latent=latent, output=output, sun=sun, ksampler=ksampler, positive=default_positive,
        negative=default_negative, count=lambda model: Counts(model, adapter), layers=len(adapter.adapter.layers),
    )  # fmt: skip


def _unet(model_folder: Path):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel.from_pretrained(model_folder / "unet").float()


class Counts:
    """Counts calls while it is entered: .unet (of its module), .sun (of SUN's attention), .timesteps the U-Net saw."""

    def __init__(self, model, adapter) -> None:
        self._model, self._adapter = model, adapter

    def __enter__(self) -> Counts:
        self.unet, self.sun, self.timesteps = 0, 0, []
        self._handle = self._model.model.diffusion_model.register_forward_pre_hook(self._unet)
        package = type(self._adapter).__module__.rpartition(".")[0]
        self._patch = importlib.import_module(f"{package}.sun_patch")
        self._attention, self._patch.sun_attention = self._patch.sun_attention, self._sun
        return self

    def _unet(self, _, args) -> None:
        self.unet += 1
        self.timesteps.append(int(args[1][0]))

    def _sun(self, *args, **kwargs):
        self.sun += 1
        return self._attention(*args, **kwargs)

    def __exit__(self, *_) -> None:
        self._handle.remove()
        self._patch.sun_attention = self._attention


def attention_blocks(model) -> list[tuple[str, int]]:
    """The keys of a MODEL's blocks with attention, as packs that replace attn2 list them for Stable Diffusion 1.5."""
    unet = model.model.diffusion_model
    groups = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    return [
        (name, i)
        for name, blocks in groups
        for i, block in enumerate(blocks)
        if any(hasattr(part, "transformer_blocks") for part in block)
    ]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def sample_with(
    node, model, run, start=None, name="euler", sigmas=None, guider=None, cfg=1.0, seed=7, scheduler="simple"
):
    """4 steps with one of ComfyUI's own sampler nodes; the custom ones take `sigmas`, the advanced one `guider`."""
    import comfy_extras.nodes_custom_sampler as custom

    import nodes

    start = run.latent() if start is None else start
    if node == "KSampler":
        return nodes.KSampler().sample(
            model, seed, 4, cfg, name, scheduler, run.positive, run.negative, start, 1.0
        )[0]["samples"]  # fmt: skip
    if node == "KSamplerAdvanced":
        return nodes.KSamplerAdvanced().sample(
            model, "enable", seed, 4, cfg, name, scheduler, run.positive, run.negative, start, 0, 10000, "disable"
        )[0]["samples"]  # fmt: skip
    sampler = custom.KSamplerSelect.execute(name).result[0]
    if node == "SamplerCustom":
        return custom.SamplerCustom.execute(
            model, True, seed, cfg, run.positive, run.negative, sampler, sigmas, start
        ).result[0]["samples"]  # fmt: skip
    if guider is None:
        guider = custom.CFGGuider.execute(model, run.positive, run.negative, cfg).result[0]
    noise = custom.RandomNoise.execute(seed).result[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, start).result[0]["samples"]
