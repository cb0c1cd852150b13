"""Networks: ReXNet with a replaceable head, its weights, model files, and the predictor that uses them. No Lightning.

May import `data` (decoding and preprocessing) and `utils`.
"""
