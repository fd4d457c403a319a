"""From a recipe's name to a job: what is asked for, what would stop it, the task, and the jobs that run it."""
