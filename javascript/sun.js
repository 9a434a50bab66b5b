// The tab SUN: gives each run an id, so that the host shows its progress bar and live preview over the gallery, and starts
// the host's token counters. The accordions: dims what SUN takes the place of.

function sun_submit() {
    const id = randomId();
    const find = (name) => gradioApp().getElementById(name);
    requestProgress(id, find("sun_gallery_container"), find("sun_gallery"), function() {});
    // Gradio 3 sends the outputs along; the gallery of the last run need not travel.
    const values = Array.from(arguments, (value) => (Array.isArray(value) ? null : value));
    values[0] = id;
    return values;
}

function sun_token_counters(work) {
    for (const box of ["sun_prompt", "sun_negative"]) {
        if (gradioApp().getElementById(box)) work(box, `${box}_token_counter`, `${box}_token_button`);
    }
}

// By the chosen "SUN sampler": its own, the page's on SUN's timesteps, the page's sampler and schedule.
const SUN_TAKES_OVER = [["sampling", "scheduler", "steps", "cfg_scale"], ["scheduler", "steps", "cfg_scale"], ["steps", "cfg_scale"]];

function sun_dim() {
    for (const tab of ["txt2img", "img2img"]) {
        const find = (name) => gradioApp().querySelector(`#script_${tab}_sun_${name}`);
        const on = gradioApp().querySelector(`#script_${tab}_sun_enabled-checkbox input`)?.checked;
        const radios = Array.from(find("sampling")?.querySelectorAll("input") ?? []);
        const chosen = SUN_TAKES_OVER[Math.max(radios.findIndex((radio) => radio.checked), 0)];
        for (const name of SUN_TAKES_OVER[0]) {
            const control = gradioApp().getElementById(`${tab}_${name}`);
            const taken = Boolean(on && chosen.includes(name));
            if (!control || control.classList.contains("sun-takes-over") === taken) continue;
            control.classList.toggle("sun-takes-over", taken);
            if (taken) control.title = "SUN is on and takes the place of this";
            else control.removeAttribute("title");
        }
    }
}

onUiLoaded(function() {
    if (typeof setupTokenCounting === "function") sun_token_counters(setupTokenCounting);
    for (const kind of ["change", "click"]) document.addEventListener(kind, () => setTimeout(sun_dim, 100));
    sun_dim();
});
onUiUpdate(sun_dim);
if (typeof onOptionsChanged === "function" && typeof toggleTokenCountingVisibility === "function") {
    onOptionsChanged(() => sun_token_counters(toggleTokenCountingVisibility));
}
