"""Merging into a checkpoint on the disk, and the exact way back."""
