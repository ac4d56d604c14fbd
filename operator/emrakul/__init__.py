"""The control plane: settings, API types, strategy, schedule, the core that decides and the edges that act."""
