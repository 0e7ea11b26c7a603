"""Ways to a stimulator."""
