"""What must not be published: tokens, keys, addresses and local paths, found in every file before it is sent."""
