"""What every other folder builds on: errors, files, and the process (memory, signals, streams).

May import nothing else of this package. No torch.
"""
