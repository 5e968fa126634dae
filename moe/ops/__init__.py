"""Array-to-array operations of the MoE layer: permutations between tokens and expert slots."""
