"""Holding the mounted file systems of a device still, for a moment that is sure to end.

`find` says which they are, `freeze` holds them, `guard` is the process that lets them go when
nobody else does.
"""
