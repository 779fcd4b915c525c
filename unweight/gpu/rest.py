"""A matrix asleep: exponents entropy coded, in host memory, until it is wanted on the device again.

For layers that are offloaded and models that sleep: two thirds of BF16's bytes, and as much less to
send over the bus than from a plain copy. Knows the coder and the tiles, not who sleeps or why.
"""

from __future__ import annotations
