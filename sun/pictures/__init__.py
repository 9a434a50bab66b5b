"""Pictures: recipes, drawing them, PNG files and grids, comparisons."""
