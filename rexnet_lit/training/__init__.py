"""How a network is trained: the LightningModule, losses, schedules, optimisers, freezing, metrics, calibration.

May import `models`, `data` and `utils`.
"""
