"""Running ranks on Ray: connection, placement, actors, lost nodes, and metrics."""
