"""What a job tells of itself while it trains: what it is, how it ended, and whether it forgets."""
