"""A component for delible in a package of its own."""
