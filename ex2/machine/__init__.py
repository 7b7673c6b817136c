"""What a run needs of the machine: signals, locks, files, several processes, CUDA graphs."""
