"""Reading graphs: capture levels, operator views, hazards and metadata. Nothing here changes a graph."""
