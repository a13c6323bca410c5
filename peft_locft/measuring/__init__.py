"""What an evaluation asks, how it scores, and what it reports."""
