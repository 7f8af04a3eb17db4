"""Everything that runs compiled: vector types, the thread team, and one file an operation. Numba lives here
and nowhere else."""
