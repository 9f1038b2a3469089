"""Generations, epochs and pending sets: what changed, and how sure of it we are."""
