"""What happens around training, as Lightning callbacks: checkpoints, logs, console output, the test report.

May import `training`, `models`, `data`, `report` and `utils`.
"""
