"""The kernel side: C programs, their header tree, compiling, loading, maps and pins.

Sectors exist only in here; everything above speaks bytes. The only importer of bcc.
"""
