"""mamba2-report: several runs on one page, or a run's own page again.

mamba2-report runs='[quotes]'                     all runs of a name, in runs/
mamba2-report runs='[runs/a,runs/b]' out=ab.html
mamba2-report runs='[multirun/2026-01-01/*]'      each job of a sweep
"""

from pathlib import Path

from mamba2_train.commands import command, console
from mamba2_train.comparison import compare, find_runs
from mamba2_train.report import write_report
from mamba2_train.schema import ReportConfig


@command(ReportConfig, "report")
def main(config: ReportConfig) -> None:
    wanted = [config.runs] if isinstance(config.runs, str) else config.runs
    runs = find_runs(wanted)
    if len(runs) == 1 and config.out is None:
        page = write_report(runs[0])
    else:
        page = compare(runs, config.out or Path("report.html"))
    console.print(f"{len(runs)} run{'s' * (len(runs) > 1)} in {page}", soft_wrap=True)
