"""What a training step will cost on a slice of TPUs, from the program that the compiler makes for it."""
