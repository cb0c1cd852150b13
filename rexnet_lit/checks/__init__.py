"""What `check` finds in a folder of images, as data and on the terminal. No torch.

May import `data` and `utils`.
"""
