"""Several runs for one answer: cross-validation, and the search for the best settings.

May import `data`, `models`, `training`, `report` and `utils`.
"""
