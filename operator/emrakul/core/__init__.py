"""The pure core: what is known of a cycle (snapshot), what to do next (plan), how it ends (ending)."""
