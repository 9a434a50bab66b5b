"""Emoji Diffusion: a small Stable Diffusion of our own, and the pictures it is trained on."""
