"""From a run's folder to a commit on the Hub: staged, checked, and verified."""
