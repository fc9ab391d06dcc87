"""How good is an attribution? Controls and baselines that every figure is shown beside."""
