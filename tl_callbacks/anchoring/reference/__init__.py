"""The reference: which weights, where they live, and that a resumed run has the same."""
