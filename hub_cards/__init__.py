"""From the files of a training run to a card that tells the truth, to the Hub, and back."""
