"""What acts inside the job: data, schedules, guards, the CPU stack, cures of upstream defects."""
