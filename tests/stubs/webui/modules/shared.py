"""opts, cmd_opts, state, the loaded model. `family` is the test's: "a1111", "forge", "reforge" or "classic"."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

family = "a1111"
sd_model: Any = None
cmd_opts = SimpleNamespace(api=True, api_auth=None, nowebui=False, sun_dir=None, lowvram=False, medvram=False)
total_tqdm = SimpleNamespace(clear=lambda: None, update=lambda: None)


class OptionInfo:
    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        section: Any = None,
    ) -> None:
        self.default, self.label, self.section = default, label, section
        self.component, self.component_args = component, component_args


class Options:
    """Values by attribute from `data`, defaults from `data_labels` (options.py)."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.data_labels: dict[str, OptionInfo] = {}
        for key, default in {
            "outdir_samples": "", "outdir_grids": "", "outdir_txt2img_samples": "t", "outdir_img2img_samples": "i",
            "outdir_txt2img_grids": "t", "outdir_img2img_grids": "i", "sgm_noise_multiplier": False,
            "img2img_fix_steps": False, "pad_cond_uncond": False, "batch_cond_uncond": True, "skip_early_cond": 0.0,
            "s_min_uncond_all": False,
            "persistent_cond_cache": True, "always_discard_next_to_last_sigma": False,
        }.items():  # fmt: skip
            self.add_option(key, OptionInfo(default))

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def __getattr__(self, name: str) -> Any:
        if name in ("data", "data_labels"):
            raise AttributeError(name)
        if name in self.data:
            return self.data[name]
        raise AttributeError(name)


class State:
    def __init__(self) -> None:
        self.interrupted = self.skipped = False
        self.job = ""
        self.sampling_step = self.sampling_steps = 0

    def begin(self, job: str = "") -> None:
        self.interrupted = self.skipped = False
        self.job = job

    def end(self) -> None:
        self.job = ""

    def interrupt(self) -> None:
        self.interrupted = True


class Styles:
    def apply_styles_to_prompt(self, prompt: str, styles: list[str]) -> str:
        return prompt

    def apply_negative_styles_to_prompt(self, prompt: str, styles: list[str]) -> str:
        return ", ".join([prompt, *styles]) if styles else prompt


opts, state, prompt_styles = Options(), State(), Styles()
