"""Float64 NumPy oracles, written from the papers and never from the code that they judge."""
