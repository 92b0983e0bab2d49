"""What anchors compute, on tensors alone: pulls, penalties, masks, distances, and the same for what LoRA adds."""
