"""mamba2-doctor: what of this machine a run would stumble over, and what to do about it.

mamba2-doctor
mamba2-doctor json=true run_dir=/scratch/runs
"""

import json
import sys

from rich.markup import escape

from mamba2_train.commands import command, console
from mamba2_train.doctor import examine
from mamba2_train.schema import DoctorConfig

COLORS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@command(DoctorConfig, "doctor")
def main(config: DoctorConfig) -> None:
    findings = []
    for finding in examine(config.run_dir, config.timeout):
        findings.append(finding)
        if not config.as_json:
            color, cure = COLORS[finding.level], finding.cure and f": {finding.cure}"
            console.print(
                f"[{color}]{finding.level:8}[/]  {escape(finding.what):14} "
                f"{escape(finding.found + cure)}",
                soft_wrap=True,
            )
    n = {level: sum(f.level == level for f in findings) for level in COLORS}
    if config.as_json:
        print(json.dumps({"findings": [f._asdict() for f in findings], "count": n}, indent=1))
    else:
        console.print(f"{n['problem']} problems, {n['warning']} warnings")
    if n["problem"]:
        sys.exit(1)
