"""What every room needs and no model or picture is part of: settings, number formats, lazy names."""
