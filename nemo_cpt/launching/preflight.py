"""What the doctor finds of a job in seconds, looked at before each launch."""

import sys

from nemo_cpt.doctor import FITTING, PREFLIGHT, Examination, Finding, Job, examine, worst
from nemo_cpt.errors import CptError


def preflight(job: Job, force: bool) -> None:
    """Examine a job before its launch: warnings are printed, errors refuse it.

    Args:
        job: as `describe` gives it.
        force: launch it all the same; its errors are printed as warnings are.

    Raises:
        CptError: something would stop the job; the message holds everything found, with its cure.
    """
    examination = Examination(job)
    findings = examine(PREFLIGHT, examination, seconds=20)
    if worst(findings) != "error":
        findings += examine(FITTING, examination, seconds=300)
    errors = [each for each in findings if each.state == "error"]
    for each in findings:
        if each.state == "warning" or (force and each.state == "error"):
            print(f"nemo-cpt: {each.state}: {_sentence(each)}", file=sys.stderr)
    if errors and not force:
        listed = "\n".join(f"  {_sentence(each)}" for each in errors)
        raise CptError(f"{job.recipe} is not launched (--force launches it all the same):\n{listed}")


def _sentence(finding: Finding) -> str:
    return f"{finding.name}: {finding.found}" + (f"; {finding.cure}" if finding.cure else "")
