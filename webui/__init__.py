"""A1111 and Forge: thin host code over `sun/`. Loaded by scripts/sun_script.py under a name of its own."""
