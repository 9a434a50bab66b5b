"""The models and packages that tests of training, evaluation and the lab share."""

from small_models import full_depth_model, packages, pictures, short_previews, tiny_model

__all__ = ["full_depth_model", "packages", "pictures", "short_previews", "tiny_model"]
