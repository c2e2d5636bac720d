"""Looking inside: attention maps, previews, trajectories."""
