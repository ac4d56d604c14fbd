"""The API types of emrakul.dev/v1alpha1, and how a manifest is read. No I/O, no Kubernetes client."""
