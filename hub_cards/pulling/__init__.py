"""From the Hub to a model that works: checked files, the right base, and the numbers of the card again."""
