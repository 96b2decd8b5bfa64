"""What a step costs: on a CPU, on an accelerator, and beside other second-order rules."""
