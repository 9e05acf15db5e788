"""What runs (jobs), on what (resources), and when (schedule). Needs neither torch nor ray."""
