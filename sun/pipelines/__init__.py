"""SUN in diffusers."""
