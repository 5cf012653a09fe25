"""What a run says about itself while it runs: numbers for Prometheus, and where the time of a step went."""
