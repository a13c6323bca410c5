"""Running a model no further than it must be: packed, cut in two, with the frozen part once."""
