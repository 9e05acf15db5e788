"""Where it runs: Ray on this machine."""
