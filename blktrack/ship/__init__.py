"""Moving data from a source to a replica. Knows extents and points, never how they were tracked."""
