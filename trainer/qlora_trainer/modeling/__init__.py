"""The model: its graph, its layers, its adapters, its weights from files."""
