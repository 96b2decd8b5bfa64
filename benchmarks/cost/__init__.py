"""What a step costs, on a CPU and on an accelerator."""
