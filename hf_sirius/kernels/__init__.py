"""Products that torch has no fast kernel for."""
