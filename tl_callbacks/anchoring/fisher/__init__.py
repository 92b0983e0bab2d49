"""The diagonal of the Fisher information: how much each weight matters to a task."""
