"""What happens around training, on Lightning's hooks: checkpoints, logs, console output, reports.

May import `training`, `models`, `data`, `report` and `utils`.
"""
