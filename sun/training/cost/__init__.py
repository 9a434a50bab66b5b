"""What a training needs, computed and measured."""
