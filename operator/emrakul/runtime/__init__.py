"""The runtimes: who starts the workers. Both run the same commands with the same arguments."""
