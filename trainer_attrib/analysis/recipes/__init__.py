"""Ways to score training examples for a behavior."""
