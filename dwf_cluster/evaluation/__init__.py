"""What models are measured by: suites of attacks, their columns, checks for gradient masking."""
