"""Text from a model: what the base answers, and what it answers with an adapter."""
