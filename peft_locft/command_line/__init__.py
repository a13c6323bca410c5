"""The flags of `locft`."""
