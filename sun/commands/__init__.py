"""The commands of ``sun``, one module a subject; they import the heavy parts when they run."""
