"""The frozen part of a model: what is frozen, and that it stays as it was."""
