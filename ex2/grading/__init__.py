"""Solutions of other people, checked against the equations."""
