"""Where and how a model is read: the places of its groups, the masks, one vector a sample, and leaving it as it was."""
