"""What is trained: data, models, and the problems made of them."""
