"""The parts of a search for a location."""
