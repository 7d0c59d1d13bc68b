"""What is trained on and scored: plain Python, no model and no library."""
