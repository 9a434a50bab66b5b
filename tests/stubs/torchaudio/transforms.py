"""Empty stand-in, see ../README.md."""


class MelScale:
    """Named in an import of ComfyUI's audio code; never made here."""
