"""The SUN adapter: one small module beside each cross-attention layer of a frozen U-Net (arXiv 2312.08887)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from einops import rearrange, reduce
from torch import nn

from . import files
from .conditioning import AdapterTexts, Branch, LayerTexts
from .files import Layout, SunFileError, SunInfo
from .layers import guess_layers, kept_positions, layers_of_ldm, layers_of_unet

Linear = Callable[..., nn.Module]


class SunLayer(nn.Module):
    """The adapter of one cross-attention layer: K and V of the negative text and, in the released layout, a second
    pair for the positive text, each with its Attention Normalization.

    channels: width C of the layer. text_width: width of the text embeddings. positive: with the positive branch.
    linear: class of the projections, for hosts with their own (ComfyUI's ``comfy.ops.manual_cast.Linear``).
    guided: alpha and beta depend on the guidance scale. normalized: with Attention Normalization; without, alpha and
    beta scale and shift the branch as it is (the paper's Fig. 8).
    """

    def __init__(
        self,
        channels: int,
        text_width: int,
        positive: bool,
        linear: Linear = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        guided: bool = False,
        normalized: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.text_width, self.positive, self.guided = channels, text_width, positive, guided
        self.normalized = normalized

        def projection() -> nn.Module:
            return linear(text_width, channels, bias=False, device=device, dtype=dtype)

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

        self.to_k_neg, self.to_v_neg = projection(), projection()
        self.alpha_neg, self.beta_neg = vector(), vector()
        if positive:
            self.to_k_pos, self.to_v_pos = projection(), projection()
            self.alpha_pos, self.beta_pos = vector(), vector()
        for part in ("neg", "pos") if guided and positive else ("neg",) if guided else ():
            for name in ("alpha", "beta"):
                slope = nn.Parameter(torch.zeros(2, channels, device=device, dtype=dtype))
                self.register_parameter(f"{name}_{part}_w", slope)

    def factor(self, name: str, guidance: torch.Tensor | None) -> torch.Tensor:
        """alpha or beta, by the parameter's name: [C], or [B, 1, C] for guidance features [B, 2]."""
        plain: torch.Tensor = getattr(self, name)
        if guidance is None or not self.guided:
            return plain
        slope: torch.Tensor = getattr(self, f"{name}_w").float()
        features = rearrange(guidance.to(slope.device, slope.dtype), "b f -> b f 1")
        # A sum of products rather than a matrix product, which autocast would round.
        return plain.float() + reduce(features * slope, "b f c -> b 1 c", "sum")

    def texts(
        self,
        negatives: Sequence[tuple[float, torch.Tensor]],
        positive: torch.Tensor | None = None,
        *,
        strength: float = 1.0,
        positive_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> LayerTexts:
        """What :func:`sun.attention.sun_attention` needs of the texts, for as many steps as they and the weights stay
        the same.

        negatives: (weight, embeddings [B, L, text_width]); several share the branch by their weights, which add up to
        1. positive: the positive text's embeddings, needed with the positive branch only. strength scales alpha and
        beta; at 0 the layer changes nothing. positive_mask: attention mask over the positive text, as ``Branch.mask``.
        guidance: what ``SunAdapter.guidance`` returns for a guidance scale, [1 or B, 2]; None is the scale the adapter
        was made for. Raises ValueError when the positive branch lacks its text.
        """
        if strength == 0.0:
            return LayerTexts()
        exact = torch.promote_types(negatives[0][1].dtype, torch.float32)
        device = negatives[0][1].device

        def scaled(name: str, by: float) -> torch.Tensor:
            return self.factor(name, guidance).to(device=device, dtype=exact) * by

        branches = [
            Branch(self.to_k_neg(text), self.to_v_neg(text), scaled("alpha_neg", -strength * weight))
            for weight, text in negatives
        ]
        shift = scaled("beta_neg", -strength)
        if self.positive:
            if positive is None:
                raise ValueError("This adapter has a positive branch: pass the positive text embeddings as `positive`.")
            key, value = self.to_k_pos(positive), self.to_v_pos(positive)
            branches.append(Branch(key, value, scaled("alpha_pos", strength), positive_mask))
            shift = shift + scaled("beta_pos", strength)
        return LayerTexts(tuple(branches), shift, self.normalized)


class SunAdapter(nn.Module):
    """All layers of an adapter, in the order of ``unet.attn_processors`` (down, up, middle).

    channels: width of each layer. names: readable layer names for files; derived from the widths if not given.
    info: what the file says of it; ``info.normalized`` decides whether the layers normalize.
    """

    def __init__(
        self,
        channels: Sequence[int],
        text_width: int,
        positive: bool = True,
        *,
        names: Sequence[str] | None = None,
        info: SunInfo | None = None,
        linear: Linear = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        guided: bool = False,
    ) -> None:
        super().__init__()
        self.text_width, self.positive, self.guided = text_width, positive, guided
        self.info = replace(info or SunInfo(), branches="negative+positive" if positive else "negative")
        self.layers = nn.ModuleList(
            SunLayer(c, text_width, positive, linear, device, dtype, guided=guided, normalized=self.info.normalized)
            for c in channels
        )
        if names is None:
            guessed = guess_layers(channels)
            names = [la.name for la in guessed] if guessed else [f"layers.{i}" for i in range(len(channels))]
        self.names = tuple(names)
        if len(self.names) != len(self.layers):
            raise ValueError(f"{len(self.names)} names for {len(self.layers)} layers.")

    @property
    def channels(self) -> tuple[int, ...]:
        """Width of each layer, in order of index."""
        return tuple(layer.channels for layer in self.sun_layers())

    def sun_layers(self) -> list[SunLayer]:
        """The layers with their type (``nn.ModuleList`` forgets it)."""
        return [layer for layer in self.layers if isinstance(layer, SunLayer)]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        linear: Linear = nn.Linear,
    ) -> SunAdapter:
        """Load a file of either layout, in evaluation mode; ``dtype=None`` keeps the file's dtypes.

        linear: class of the projections. Raises SunFileError, which names the file and the problem.
        """
        return cls._from_tensors(files.read(path), device, dtype, linear)

    @classmethod
    def _from_tensors(
        cls,
        content: files.AdapterTensors,
        device: torch.device | str,
        dtype: torch.dtype | None,
        linear: Linear,
    ) -> SunAdapter:
        adapter = cls(
            content.channels,
            content.text_width,
            content.positive,
            names=content.names,
            info=content.info,
            linear=linear,
            device="meta",
            guided=content.guided,
        )
        for layer, tensors in zip(adapter.layers, content.layers, strict=True):
            moved = {part: value.to(device=device, dtype=dtype or value.dtype) for part, value in tensors.items()}
            layer.load_state_dict(moved, assign=True)
        return adapter.eval()

    def save(self, path: str | os.PathLike[str], layout: Layout = "sun", dtype: torch.dtype | None = None) -> None:
        """Write the adapter: ``layout="sun"`` with readable names, "official" with the authors' keys.

        ``dtype=None`` keeps each tensor's. The file appears complete or not at all. Raises SunFileError or OSError.
        """
        if dtype is not None and dtype not in files.DTYPES:
            raise SunFileError(f"{path}: adapters are saved as float32, float16 or bfloat16, not {dtype}.")
        files.write(self.tensors(dtype), path, layout)

    def tensors(self, dtype: torch.dtype | None = None) -> files.AdapterTensors:
        """Its content as a file has it; ``dtype=None`` keeps each tensor's."""
        layers = tuple(
            {part: layer.state_dict()[part].to(dtype=dtype) for part in self._parts()} for layer in self.layers
        )
        return files.AdapterTensors(self.names, layers, self.info)

    def texts(
        self,
        negatives: Sequence[tuple[float, torch.Tensor]],
        positive: torch.Tensor | None = None,
        *,
        strength: float = 1.0,
        positive_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> AdapterTexts:
        """What the layers make of the texts: ``SunLayer.texts`` for each of them, arguments as there."""
        return AdapterTexts(
            tuple(
                layer.texts(negatives, positive, strength=strength, positive_mask=positive_mask, guidance=guidance)
                for layer in self.sun_layers()
            )
        )

    def guidance(self, scale: float | torch.Tensor | None) -> torch.Tensor | None:
        """Features of a guidance scale w (a number, or [B]) for the layers: [1 or B, 2], log(w / w0) and its square.

        w0 is the scale the adapter was made for; None stands for it. Returns None where the layers need nothing.
        Raises ValueError for another scale if the adapter has its own fixed in the weights, or one that is no
        positive number.
        """
        own = self.info.guidance_scale
        if scale is None or (not isinstance(scale, torch.Tensor) and scale == own):
            return None
        if not self.guided or own is None:
            fixed = f"{own:g}" if own is not None else "one value"
            raise ValueError(
                f"This adapter's guidance scale is fixed at {fixed}. Use its strength to change the effect, or an "
                "adapter that takes the guidance scale."
            )
        wanted = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)
        if not bool(((wanted > 0) & wanted.isfinite()).all()):
            wrong = next(w for w in wanted.tolist() if not 0 < w < math.inf)
            raise ValueError(f"The guidance scale must be a number above 0, not {wrong:g}.")
        ratio = torch.log(wanted / own)
        return torch.stack([ratio, ratio.square()], dim=-1)

    def guidance_note(self, scale: float | None) -> str:
        """A sentence for the user if ``scale`` lies outside what the adapter was trained on; empty otherwise."""
        trained = self.guidance_range
        if not scale or trained is None or trained[0] <= scale <= trained[1]:
            return ""
        return (
            f"The adapter was trained on guidance scales from {trained[0]:g} to {trained[1]:g}; {scale:g} is a guess."
        )

    def guidance_in_words(self) -> str:
        """Which guidance scales it takes, for people."""
        own = self.info.guidance_scale
        words = "not recorded" if own is None else f"w = {own:g}"
        if not self.guided:
            return words
        trained = self.guidance_range
        return f"{words} by default, takes others" + (
            f" (trained from {trained[0]:g} to {trained[1]:g})" if trained else ""
        )

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """From where to where it was trained to take the guidance scale, where its file says so."""
        return files.guidance_range(self.info.training) if self.guided else None

    def check_base(self, channels: Sequence[int], text_width: int, where: str) -> None:
        """Raise SunFileError, naming both sides, unless the adapter fits a U-Net with these attn2 layers.

        channels: widths in order of index. text_width: width of the text embeddings. where: name of the U-Net.
        """
        if text_width == self.text_width and tuple(channels) == self.channels:
            return
        name = str(self.info.path) if self.info.path else "The adapter"
        if text_width != self.text_width:
            mine, theirs = files.text_width_name(self.text_width), files.text_width_name(text_width)
            problem = f"it was made for text width {mine}, and {where} has {theirs}"
        elif len(channels) != len(self.layers):
            problem = f"it has {len(self.layers)} layers, and {where} has {len(channels)} cross-attention layers"
            if len(channels) < len(self.layers):
                problem += " (for a compact U-Net of its base take adapter.for_unet(unet))"
        else:
            i = next(i for i, (a, b) in enumerate(zip(channels, self.channels, strict=True)) if a != b)
            problem = f"its layer {self.names[i]} is {self.channels[i]} wide, and that of {where} is {channels[i]}"
        base = f" It was trained on {self.info.base_model}." if self.info.base_model else ""
        raise SunFileError(
            f"{name} does not fit: {problem}.{base} Use an adapter trained for this base model, or a model of the "
            "family the adapter was trained on."
        )

    def for_unet(self, unet: nn.Module) -> SunAdapter:
        """This adapter for a compact U-Net of its base (``sun.compact``): without the layers that are gone there.

        unet: of diffusers, or in LDM layout (ComfyUI, A1111, Forge). What is kept shares its tensors with this adapter.
        Returns this adapter itself where nothing is gone. Raises SunFileError for a U-Net that did not come from a base
        this adapter fits, ValueError for one of another family.
        """
        positions = kept_positions(self.names, unet)
        layers = layers_of_unet(unet) if hasattr(unet, "up_blocks") else layers_of_ldm(unet)
        if positions is None or [self.channels[i] for i in positions] != [layer.channels for layer in layers]:
            name = str(self.info.path) if self.info.path else "The adapter"
            raise SunFileError(
                f"{name} does not fit this U-Net, not even as a compact one of its base: its {len(self.layers)} layers "
                f"are {', '.join(dict.fromkeys(map(str, self.channels)))} wide, and the U-Net's {len(layers)} are "
                f"{', '.join(dict.fromkeys(str(layer.channels) for layer in layers))}. Use an adapter for its base."
            )
        if len(positions) == len(self.layers):
            return self
        fitted = SunAdapter(
            [layer.channels for layer in layers],
            self.text_width,
            self.positive,
            names=[layer.name for layer in layers],
            info=self.info,
            device="meta",
            guided=self.guided,
        )
        fitted.layers = nn.ModuleList(self.layers[i] for i in positions)
        return fitted.train(self.training)

    def _parts(self) -> list[str]:
        return files.layer_parts(self.positive, self.guided)
