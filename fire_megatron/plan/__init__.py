"""What a run will need, found by building and running its parts on tensors without memory in a world without peers."""
