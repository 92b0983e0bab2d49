"""What pytest must not import to look for doctests: it needs packages that are not in the environment."""

collect_ignore = ["deepspeed_worker.py"]
