"""Other people's libraries, imported here and nowhere else in the package, inside functions: none is required."""
