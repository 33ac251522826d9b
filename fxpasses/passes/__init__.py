"""What we change in a graph: each pass in a module of its own."""
