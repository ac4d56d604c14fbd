"""The validator: bytes, structure, constraints, dead-unit proof and accuracy gate of one candidate."""
