"""What a run tells its user: progress, metrics files, tables, plots and the report."""

from unime_jax.report.contact_sheet import plot_contact_sheet
from unime_jax.report.metrics_log import MetricsWriter, read_metrics
from unime_jax.report.plots import (
    plot_cosine_matrices,
    plot_losses,
    plot_recall,
    plot_retrieval_sheet,
)
from unime_jax.report.progress import Progress, format_seconds
from unime_jax.report.tables import Section, Table, write_report

__all__ = [
    "MetricsWriter",
    "Progress",
    "Section",
    "Table",
    "format_seconds",
    "plot_contact_sheet",
    "plot_cosine_matrices",
    "plot_losses",
    "plot_recall",
    "plot_retrieval_sheet",
    "read_metrics",
    "write_report",
]
