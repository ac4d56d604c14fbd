"""Shared contracts: ids, messages, masks, topology, the object-store port, the log, envelopes, encryption."""
