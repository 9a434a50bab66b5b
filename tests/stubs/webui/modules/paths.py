"""Where the host keeps models; a test sets it."""

models_path = "."
