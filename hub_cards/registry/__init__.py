"""The adapters of one base: listed, compared, loaded side by side, and merged."""
