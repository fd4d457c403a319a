"""What acts inside the job: data, schedules, guards, the CPU stack, patches of upstream defects."""
