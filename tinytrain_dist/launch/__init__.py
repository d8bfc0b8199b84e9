"""What starts and watches processes: the program of each rank, and the torchrun wrapper around all of them."""
