"""A run: experiments or a sweep of them, from the first job to the last merged table."""
