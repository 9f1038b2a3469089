"""The live display: draws reports, and knows nothing of where they come from."""
