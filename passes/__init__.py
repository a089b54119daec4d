"""Graph in, graph out; one pass a file."""
