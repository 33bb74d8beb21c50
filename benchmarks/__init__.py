"""What this is measured against: peers on the same machine in the same run, the machine's ceiling printed first."""
