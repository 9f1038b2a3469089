"""The policy file: which devices have which replicas, and what is promised of each.

`load` reads it, `check` holds it against this host. docs/policy.md is its reference.
"""

from blktrack.policy.model import DevicePolicy, LinkPolicy, Policy
from blktrack.policy.read import PolicyError, Problem, load, read

__all__ = ["DevicePolicy", "LinkPolicy", "Policy", "PolicyError", "Problem", "load", "read"]
