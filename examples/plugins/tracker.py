"""A tracker: every metric as a line of a CSV file. Use it with ``track_with: csv``."""

import csv

from limbeck.registry import TRACKERS


class CsvTracker:
    def __init__(self, log_dir, kwargs):
        log_dir.mkdir(parents=True, exist_ok=True)
        self.file = (log_dir / kwargs.get("file", "metrics.csv")).open("a", newline="")
        self.writer = csv.writer(self.file)

    def log(self, step, values):
        self.writer.writerows((step, name, value) for name, value in values.items())
        self.file.flush()

    def close(self):
        self.file.close()


TRACKERS.register("csv")(CsvTracker)
