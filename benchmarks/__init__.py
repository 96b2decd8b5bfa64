"""What the claims of the project are measured with: a room for each question."""
