"""How a training goes on: the run, its log, its checkpoint."""
