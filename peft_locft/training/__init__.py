"""The parts of the trainer, and what is built on it."""
