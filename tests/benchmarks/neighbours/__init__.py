"""The same gradual unfreezing on two ranks, by this package, by others, and by callbacks as they are often written."""
