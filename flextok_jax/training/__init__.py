"""What the train loop is made of: state, optimiser, placement, checkpoints, metrics."""
