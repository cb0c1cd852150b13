"""Model files for other programs, one function per format.

May import `models`, `data`, `report` and `utils`. No Lightning.
"""
