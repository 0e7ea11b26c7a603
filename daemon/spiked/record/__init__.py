"""Recording: ring to crash-safe NWB, and the recovery of files whose writer died."""
