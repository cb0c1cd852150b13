"""The command line: parsing, messages, and one place where errors become one line.

May import every other folder; nothing imports it.
"""
