"""The evaluation of models: suites of attacks, their columns, checks for gradient masking."""
