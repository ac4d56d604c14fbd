"""A real Kubernetes for the tests: an API server alone on loopback, or a whole node. No Docker is needed."""
