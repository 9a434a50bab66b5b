"""Training of SUN adapters on any diffusers-format SD 1.x model."""
