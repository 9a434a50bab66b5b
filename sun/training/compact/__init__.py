"""``sun train-compact``: incubation of each slimmed stage inside the frozen original, then distillation."""
