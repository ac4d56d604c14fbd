"""SeaweedFS in the cluster: the object store that the tests' runs lie in."""
