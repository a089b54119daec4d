"""From serving graphs to what engines run."""
