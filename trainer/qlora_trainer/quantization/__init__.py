"""How frozen weights are stored and multiplied with."""
