"""What a job is looked at for before each launch, from the command line and from Python alike."""

import sys

from nemo_cpt.doctor import FITTING, PREFLIGHT, Examination, Finding, Job, examine, worst
from nemo_cpt.errors import CptError


def preflight(job: Job, force: bool, how_to_force: str, speaker: str) -> list[Finding]:
    """Examine a job before its launch: warnings are printed, errors refuse it.

    Args:
        job: what is to be launched, and where.
        force: launch it all the same; its errors are printed as warnings are.
        how_to_force: what the user gives for that.
        speaker: who says the warnings.

    Returns:
        Its errors, which there are only with `force`.

    Raises:
        CptError: something would stop the job; the message holds everything found, with its cure.
    """
    examination = Examination(job)
    findings = examine(PREFLIGHT, examination, seconds=20)
    # Planning imports NeMo: not where the job is refused anyway.
    if worst(findings) != "error":
        findings += examine(FITTING, examination, seconds=300)
    errors = [each for each in findings if each.state == "error"]
    for each in findings:
        if each.state == "warning" or (force and each.state == "error"):
            print(f"{speaker}: {each.state}: {each}", file=sys.stderr)
    # All of them at once: who mends one shall not meet the next at the next attempt.
    if errors and not force:
        listed = "\n".join(f"  {each}" for each in errors)
        raise CptError(f"{job.recipe} is not launched ({how_to_force} launches it all the same):\n{listed}")
    return errors
