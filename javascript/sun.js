// The tab SUN: gives each run an id, so that the host shows its progress bar and live preview over the gallery.

function sun_submit() {
    const id = randomId();
    const find = (name) => gradioApp().getElementById(name);
    requestProgress(id, find("sun_gallery_container"), find("sun_gallery"), function() {});
    // Gradio 3 sends the outputs along; the gallery of the last run need not travel.
    const values = Array.from(arguments, (value) => (Array.isArray(value) ? null : value));
    values[0] = id;
    return values;
}
