"""Process groups of a role, collectives on explicit groups, reductions for global statistics."""
