"""Looking at runs: plots and the report."""
