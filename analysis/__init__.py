"""Tables, tests, figures and a report from the Parquet tables of experiments. Needs neither torch nor ray.

    from analysis import load

    runs = load("./runs")
    runs.evaluations.groupby(["model", "attack"], observed=True).accuracy.mean()

More in docs/analysis.md.
"""

from analysis.results import Group, Results, load

__all__ = ["Group", "Results", "load"]
