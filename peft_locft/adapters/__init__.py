"""Adapter folders: written whole, read with suspicion, described, shared, exported."""
