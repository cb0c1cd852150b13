"""Tables, figures and HTML pages, as functions of plain arrays. No torch.

May import `utils`.
"""
