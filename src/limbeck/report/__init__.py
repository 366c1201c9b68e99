"""Reports: one run folder, or several compared, as one self-contained HTML file."""

from limbeck.report.charts import Level
from limbeck.report.results import Answer, ResultRow, ResultTable, Sample
from limbeck.report.run import Run, load_run, load_runs
from limbeck.report.write import write_report

__all__ = ["Answer", "Level", "ResultRow", "ResultTable", "Run", "Sample", "load_run", "load_runs", "write_report"]
