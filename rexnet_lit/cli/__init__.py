"""The command line: the commands, config files, checks of the trainer, and errors as one line with an exit code.

May import every other folder; nothing imports it.
"""
