"""The QLoRAJob API: its types, their schema, its names, and how its files are read."""
