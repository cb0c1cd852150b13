"""What a test showed: metrics, tables, figures and a page, as pure functions of predictions."""

from rexnet_lit.report.dataset import write_checkup
from rexnet_lit.report.metrics import Predictions, compute_metrics, write_predictions
from rexnet_lit.report.page import write_report

__all__ = ["Predictions", "compute_metrics", "write_checkup", "write_predictions", "write_report"]
