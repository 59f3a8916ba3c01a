"""Our models against the packages that they come from, each in an environment of its own."""
