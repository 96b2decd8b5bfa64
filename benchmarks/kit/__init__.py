"""What the rooms share: stored rows, tables, rivals, costs, and the training loop."""
