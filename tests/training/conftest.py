"""The models and packages that tests of training, evaluation and the lab share."""

from small_models import packages, pictures, tiny_model

__all__ = ["packages", "pictures", "tiny_model"]
