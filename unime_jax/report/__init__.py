"""What a run tells its user: progress, metrics files, tables, plots and the report."""

from unime_jax.report.contact_sheet import plot_contact_sheet
from unime_jax.report.differences import plot_differences
from unime_jax.report.metrics_log import MetricsWriter, read_metrics
from unime_jax.report.plots import (
    plot_cosine_matrices,
    plot_losses,
    plot_recall,
    plot_retrieval_sheet,
)
from unime_jax.report.progress import Progress, format_seconds
from unime_jax.report.scores import plot_dumbbells, plot_groups
from unime_jax.report.sheets import SheetCell, SheetRow, plot_sheet
from unime_jax.report.tables import Section, Table, print_report, replace_text, write_report
from unime_jax.report.token_bars import plot_token_bars, visible

__all__ = [
    "MetricsWriter",
    "Progress",
    "Section",
    "SheetCell",
    "SheetRow",
    "Table",
    "format_seconds",
    "plot_contact_sheet",
    "plot_cosine_matrices",
    "plot_differences",
    "plot_dumbbells",
    "plot_groups",
    "plot_losses",
    "plot_recall",
    "plot_retrieval_sheet",
    "plot_sheet",
    "print_report",
    "plot_token_bars",
    "read_metrics",
    "replace_text",
    "visible",
    "write_report",
]
